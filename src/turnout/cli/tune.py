"""`turnout tune`: measure how experts are best reached, and say why."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from turnout.cli import options
from turnout.cli.console import console, print_json, table

if TYPE_CHECKING:
    from turnout.tune import Dictionary, Key, Row

EPILOG = """Examples:

turnout tune tiny --ranks 4 --out strategies.json

turnout tune tiny --ranks 4 --set strategy.ep=2 --set strategy.etp=2 --loads 1,2,4

turnout tune --explain strategies.json

torchrun --nproc-per-node 8 -m turnout tune my.toml --out strategies.json

torchrun --nproc-per-node 8 -m turnout train my.toml --set loop.tune=strategies.json
"""


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(tune)


def tune(
    recipe: Annotated[str | None, typer.Argument(help="Built-in recipe or a TOML file.")] = None,
    explain: Annotated[
        Path | None, typer.Option("--explain", help="Say what is in this dictionary and why; measures nothing.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes of this machine, unless torchrun started several.")] = 2,
    out: Annotated[Path, typer.Option(help="The dictionary; what is in it already is gone on from.")] = Path(
        "strategies.json"
    ),
    loads: Annotated[str, typer.Option(help="Multiples of the recipe's batch to measure, such as 1,2,4.")] = "1",
    steps: Annotated[int, typer.Option(help="Most steps of one load.")] = 200,
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Measure r, chunks and all-to-all programs of a recipe's experts, and write the dictionary that `train` takes."""
    from turnout.errors import ConfigError
    from turnout.tune import Dictionary

    if (recipe is None) == (explain is None):
        raise ConfigError("tune takes a recipe to measure, or --explain FILE")
    if explain is None:
        assert recipe is not None
        found = _measured(recipe, settings or [], ranks, out, (loads, steps), as_json=as_json)
    else:
        if not explain.is_file():
            raise ConfigError(f"--explain {explain}: no such file; `turnout tune RECIPE --out {explain}` writes one")
        found = Dictionary.from_json(explain.read_text(encoding="utf-8"), str(explain))
    if found is not None:
        _show(found, console(as_json=as_json), as_json=as_json)


def _measured(
    name: str, settings: list[str], ranks: int, out: Path, plan: tuple[str, int], *, as_json: bool
) -> "Dictionary | None":
    """What the first rank found; on other ranks nothing."""
    from turnout.comm import is_launched, join
    from turnout.train.device import pick_device
    from turnout.train.recipes import load_recipe
    from turnout.train.tuned import save_dictionary
    from turnout.train.tuning import Plan, tune, tune_here

    recipe, known = load_recipe(name, settings), out.read_text(encoding="utf-8") if out.exists() else ""
    asked = Plan(loads=options.whole_numbers("--loads", plan[0], example="1,2,4"), most_steps=plan[1])
    screen, is_first = console(as_json=as_json), True
    if is_launched():
        cuda = pick_device(recipe.loop.device).type == "cuda"
        with join(cuda=cuda, timeout_s=recipe.loop.timeout_s) as world:
            found = tune(recipe, world, asked, known, str(out), screen.print if world.is_first else lambda _: None)
            is_first = world.is_first
    else:
        found = tune_here(recipe, ranks, asked, known, str(out))
    if not is_first:
        return None
    save_dictionary(found, out.absolute())
    screen.print(f"  written: {out}")
    return found


def _show(found: "Dictionary", screen: Console, *, as_json: bool) -> None:
    from turnout.tune import explain

    screen.print(f"  {_machine(found)}")
    by_key = {key: explain(entry, found.rules, found.hardware.busy) for key, entry in sorted(found.entries.items())}
    for key, rows in by_key.items():
        _print(key, rows, screen)
    if not by_key:
        screen.print("  nothing measured yet")
    if as_json:
        keys = [{"key": vars(key), **_to_json(rows)} for key, rows in by_key.items()]
        first = keys[0] if keys else {"choice": None, "candidates": []}
        print_json({"choice": first["choice"], "candidates": first["candidates"], "keys": keys})


def _print(key: "Key", rows: "Sequence[Row]", screen: Console) -> None:
    from turnout.tune.choice import SKEW_STEP, WINDOW

    low, skew = WINDOW * key.capacity, SKEW_STEP**key.skew
    heading = f"{low} to {low + WINDOW - 1} rows an expert, the busiest {skew:.2g} times that or more; {key.shape}"
    cells = [
        [
            str(row.choice),
            f"{1e3 * row.predicted_s:.2f}",
            "" if row.measured_s is None else f"{1e3 * row.measured_s:.2f}",
            str(row.steps),
            row.reason,
        ]
        for row in rows
    ]
    columns = {
        "choice": "left",
        "layer predicted ms": "right",
        "step measured ms": "right",
        "steps": "right",
        "why": "left",
    }
    screen.print(table(heading, columns, cells))
    screen.print(f"  on {key.hardware}")


def _machine(found: "Dictionary") -> str:
    hardware = found.hardware
    words = [f"{hardware.name}: {hardware.flops_per_s / 1e9:,.1f} GFLOP/s a rank"]
    for tier, link in (("a node's ranks", hardware.intra), ("other nodes", hardware.inter)):
        words.append(f"to {tier} {link.bytes_per_s / 1e6:,.0f} MB/s and {1e6 * link.latency_s:,.0f} us a message")
    return ", ".join(words) + f"; processors at work in {hardware.busy:.0%} of an exchange"


def _to_json(rows: "Sequence[Row]") -> dict[str, Any]:
    candidates = [
        {"strategy": vars(row.choice), "predicted_s": row.predicted_s, "measured_s": row.measured_s}
        | {"steps": row.steps, "reason": row.reason}
        for row in rows
    ]
    taken = next((each["strategy"] for each in candidates if each["reason"].startswith("taken")), None)
    return {"choice": taken, "candidates": candidates}
