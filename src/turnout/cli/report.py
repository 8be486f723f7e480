"""`turnout report`: one HTML file about a run."""

from pathlib import Path
from typing import Annotated

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout report runs/tiny-1 -o tiny.html")(report)


def report(
    run: options.RunFolder,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file; default RUN/report.html.")] = None,
    as_json: options.Json = False,
) -> None:
    """Write a self-contained HTML report: no server, no network."""
    from turnout.observe.report import write_report

    path = write_report(run, out or run / "report.html")
    console(as_json=as_json).print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")
    if as_json:
        print_json({"run": str(run), "out": str(path), "bytes": path.stat().st_size})
