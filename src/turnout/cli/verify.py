"""`turnout verify`: the conformance suite on a layer of ours or another's."""

import os
import sys
from collections import Counter
from typing import Annotated

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json, table


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout verify mixtral; turnout verify my_package.layers:build_moe --json")(verify)


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
    as_json: options.Json = False,
) -> None:
    """Check a Mixture-of-Experts layer: exit 0 if nothing fails; each failure shows its smallest case and its price."""
    from turnout.verify import verify as run_checks
    from turnout.verify.targets import subject

    # as `python -m turnout` has it: a module of the folder one stands in can be named
    sys.path.insert(0, os.getcwd())
    chosen = subject(target)
    screen = console(as_json=as_json)
    versions = ", ".join(f"{name} {version}" for name, version in chosen.versions.items())
    screen.print(f"  {chosen.name}  ({versions})")
    results = run_checks(chosen, [part for part in only.split(",") if part])
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
                "passed": counts["pass"],
                "failed": counts["fail"],
                "not_applicable": counts["not applicable"],
                "versions": dict(chosen.versions),
                "checks": [vars(result) for result in results],
            }
        )
    if counts["fail"]:
        raise typer.Exit(1)
