"""`turnout doctor`: each backend tried forward and backward, each optional dependency looked for."""

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json, table


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout doctor --json")(doctor)


def doctor(as_json: options.Json = False) -> None:
    """What works on this machine, what does not, and why."""
    from turnout.cli.process import own_process
    from turnout.train.doctor import examine

    process = own_process(0)
    findings = examine()
    screen = console(as_json=as_json)
    screen.print(process)
    for part, rows in findings.items():
        cells = [[r.name, _word(r.available), _word(r.proven), r.reason] for r in rows]
        columns = {"name": "left", "available": "left", "proven": "left", "why": "left"}
        screen.print(table(part, columns, cells))
    if as_json:
        print_json({part: [vars(row) for row in rows] for part, rows in findings.items()} | {"process": process})
    if any(row.available and not row.proven for row in findings["backends"]):
        raise typer.Exit(1)


def _word(value: bool) -> str:
    return "yes" if value else "no"
