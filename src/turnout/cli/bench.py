"""`turnout bench CASE`: gated measurements against named peers."""

from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json, table


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout bench train-step --json")(bench)


def bench(
    case: Annotated[str, typer.Argument(help="The case: train-step.", show_default=False)],
    recipe: Annotated[str, typer.Option(help="Recipe whose model is measured.")] = "tiny",
    dense: Annotated[str, typer.Option(help="Its dense twin.")] = "tiny-dense",
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before them.", min=0)] = 3,
    peers: Annotated[str, typer.Option(help="Comma-separated peers; empty: all.")] = "",
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = True,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Measure a case; the layer is first proven against the oracle, and a red gate prints no number."""
    from turnout.bench.run import CASES, run_case
    from turnout.cli.process import own_process
    from turnout.errors import ConfigError
    from turnout.train.recipes import load_recipe

    if case not in CASES:
        raise ConfigError(f"unknown case {case!r}; available: {', '.join(CASES.names())}")
    process = own_process(threads)
    names = tuple(name.strip() for name in peers.split(",") if name.strip())
    result = run_case(
        case, load_recipe(recipe), load_recipe(dense), peers=names, rounds=rounds, warmup=warmup, memory=memory
    )
    screen = console(as_json=as_json)
    screen.print(f"  {process}; {result['machine']['processor']}, {result['machine']['cores']} cores")
    screen.print(_card(case, recipe, result["rows"]))
    if as_json:
        print_json(result)


def _card(case: str, recipe: str, rows: list[dict[str, Any]]) -> Any:
    columns = {"peer": "left", "median ms": "right", "min": "right", "max": "right", "tokens/s": "right"}
    columns |= {"turnout is": "right", "of dense": "right", "of GEMM limit": "right", "peak MiB": "right"}
    cells = [
        [
            row["peer"],
            f"{row['ms_median']:.0f}",
            f"{row['ms_min']:.0f}",
            f"{row['ms_max']:.0f}",
            f"{row['tokens_per_s']:,.0f}",
            _number(row["speedup_of_turnout"], ".2f", "x"),
            _number(row["ratio_to_dense"], ".2f"),
            _number(row["ratio_to_limit"], ".2f"),
            _number(row["peak_mib"], ".0f"),
        ]
        for row in rows
    ]
    return table(f"{case} of {recipe}: everybody in turns in one process", columns, cells)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
