"""`turnout bench train-ranks`: a training step on several ranks of this machine."""

from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, measured_on, print_json, table

EXAMPLES = "Example: turnout bench train-ranks --ranks 4 --json"


def train_ranks(
    recipe: Annotated[str, typer.Option(help="Recipe whose model is measured.")] = "tiny",
    ranks: Annotated[int, typer.Option(help="Ranks, over which its experts lie.", min=2)] = 2,
    peers: Annotated[str, typer.Option(help="Comma-separated peers; empty: all.")] = "",
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before them, which are not counted.", min=0)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of a rank; 0: the cores shared out.", min=0)] = 0,
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """A training step on several ranks, experts over all of them, against DeepSpeed's MoE layers and engine."""
    from turnout.bench.train_ranks import run
    from turnout.cli.process import own_process
    from turnout.train.recipes import load_recipe

    process = own_process(threads)
    chosen = load_recipe(recipe, options.recipe_overrides(settings, None))
    names = options.words(peers)
    result = run(chosen, ranks, peers=names, threads=threads, rounds=rounds, warmup=warmup)
    screen = console(as_json=as_json)
    screen.print(measured_on(process, result))
    title = f"Training step of {chosen.name} on {ranks} ranks: everybody in turns in the same processes"
    screen.print(_table(title, result["rows"]))
    for row in result["rows"]:
        screen.print(f"  {row['peer']} routes by {row['routing']}")
    if as_json:
        print_json(result)


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    columns = {"peer": "left", "median ms": "right", "min": "right", "max": "right", "tokens/s": "right"}
    columns |= {"turnout is": "right", "so routed it is": "right"}
    cells = [
        [
            row["peer"],
            *(f"{row[name]:.0f}" for name in ("ms_median", "ms_min", "ms_max")),
            f"{row['tokens_per_s']:,.0f}",
            _times(row, "speedup_of_turnout"),
            _times(row, "speedup_of_turnout_deepspeed_routing"),
        ]
        for row in rows
    ]
    return table(title, columns, cells)


def _times(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.2f} ({low:.2f}-{high:.2f})"
