"""`turnout verify`: the conformance suite on a layer of ours or another's, and the self-check of a layout."""

import os
import sys
from collections import Counter
from typing import Annotated

import typer
from rich.console import Console

from turnout.cli import options
from turnout.cli.console import console, print_json, table

EPILOG = """Examples:

turnout verify mixtral

turnout verify tiny --set model.moe.router=sinkhorn

turnout verify my_package.layers:build_moe --json

turnout verify tiny --parallel 4 --set strategy.ep=4 --set strategy.alltoall=node_dedup
"""


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(verify)


def verify(
    target: Annotated[
        str,
        typer.Argument(
            help="A layer preset, a recipe, a run, transformers:BLOCK[:IMPLEMENTATION], deepspeed:top1 (top2, topk), "
            "torchtitan:moe, st_moe_pytorch:moe, or package.module:factory.",
            show_default=False,
        ),
    ],
    only: Annotated[str, typer.Option(help="Comma-separated ids of checks; empty: all.")] = "",
    parallel: Annotated[
        int,
        typer.Option(min=0, help="Compare the recipe TARGET on so many processes of this machine with one; 0: do not."),
    ] = 0,
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Check a Mixture-of-Experts layer: exit 0 if a check passes and none fails; failures show their smallest case."""
    from turnout.errors import ConfigError

    screen = console(as_json=as_json)
    ids = list(dict.fromkeys(part.strip() for part in only.split(",") if part.strip()))
    if only and not ids:
        raise ConfigError(f"--only {only!r} names no check; write ids such as O1,G2")
    if parallel:
        if ids:
            raise ConfigError("--only names checks of a layer; --parallel has none, and compares every tensor")
        _verify_parallel(target, parallel, settings or [], screen, as_json=as_json)
        return
    _verify_layer(target, settings or [], ids, screen, as_json=as_json)


def _verify_parallel(target: str, ranks: int, settings: list[str], screen: Console, *, as_json: bool) -> None:
    from turnout.train.recipes import load_recipe
    from turnout.verify.parallel import verify_parallel

    recipe = load_recipe(target, settings)
    rows = verify_parallel(recipe, ranks)
    cells = [[row.name, f"{row.error:.1e}", "pass" if row.holds else "FAIL"] for row in rows]
    strategy = recipe.strategy
    heading = f"{recipe.name} on {ranks} ranks, experts over {strategy.ep} by {strategy.alltoall}"
    heading += f", each cut over {strategy.etp}" if strategy.etp > 1 else ""
    heading += f", in {strategy.overlap} chunks" if strategy.overlap > 1 else ""
    heading += f", r={strategy.adaptive_r}" if strategy.adaptive_r >= 0 else ""
    heading += f"; attention and dense layers over {strategy.tp}" if strategy.tp > 1 else ""
    heading += " in sequence parallel" if strategy.sequence_parallel else ""
    heading += f"; {strategy.pp * strategy.virtual_stages} stages by {strategy.schedule}" if strategy.pp > 1 else ""
    columns = {"tensor": "left", "largest error": "right", "outcome": "left"}
    screen.print(table(f"verify {heading}, against one process", columns, cells))
    failed = [row.name for row in rows if not row.holds]
    screen.print(f"  {len(rows) - len(failed)} equal within {rows[0].tolerance:.0e}, {len(failed)} not")
    if as_json:
        checks = [{"id": row.name, "outcome": "pass" if row.holds else "fail", "error": row.error} for row in rows]
        counts = {"passed": len(rows) - len(failed), "failed": len(failed), "not_applicable": 0}
        print_json({"target": target, "ranks": ranks, **counts, "checks": checks})
    if failed:
        raise typer.Exit(1)


def _verify_layer(target: str, settings: list[str], ids: list[str], screen: Console, *, as_json: bool) -> None:
    from turnout.verify import verify as run_checks
    from turnout.verify.targets import subject

    # as `python -m turnout` has it: a module of the folder one stands in can be named
    sys.path.insert(0, os.getcwd())
    chosen = subject(target, settings)
    versions = ", ".join(f"{name} {version}" for name, version in chosen.versions.items())
    screen.print(f"  {chosen.name}  ({versions})")
    results = run_checks(chosen, ids)
    columns = {"check": "left", "what": "left", "outcome": "left", "error": "right", "case": "left"}
    cells = [
        [r.id, r.title, r.outcome, "" if r.error is None else f"{r.error:.1e}", r.case if r.outcome != "pass" else ""]
        for r in results
    ]
    screen.print(table(f"verify {chosen.name}", columns, cells))
    for result in results:
        if result.outcome == "fail":
            screen.print(f"  {result.id} {result.title}: {result.meaning}")
    counts = Counter(result.outcome for result in results)
    screen.print(f"  {counts['pass']} passed, {counts['fail']} failed, {counts['not applicable']} not applicable")
    if as_json:
        print_json(
            {
                "target": target,
                "settings": settings,
                "passed": counts["pass"],
                "failed": counts["fail"],
                "not_applicable": counts["not applicable"],
                "versions": dict(chosen.versions),
                "checks": [vars(result) for result in results],
            }
        )
    if not ids and not counts["pass"]:
        screen.print("  nothing was checked: the layer can be built in none of the suite's sizes")
    if counts["fail"] or not (ids or counts["pass"]):
        raise typer.Exit(1)
