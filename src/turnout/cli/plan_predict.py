"""`turnout plan predict`: published or own measurements, predicted row by row."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from turnout.cli import options, plan_options

CaseFile = Annotated[
    Path, typer.Option("--cases", help="A JSON file in the schema of published_cases.json.", metavar="FILE")
]


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout plan predict --cases my_runs.json --json")(predict)


def predict(cases: CaseFile, csv: plan_options.Csv = None, as_json: options.Json = False) -> None:
    """Answer each row of a file in the row's own quantity and unit, or refuse it and say why."""
    from turnout.cli import plan_print as show
    from turnout.cli.console import print_json, table
    from turnout.plan.cases import read_cases
    from turnout.plan.predict import predict as predict_rows

    document = read_cases(cases)
    answers = predict_rows(document["rows"], document["models"])
    screen = show.wide_console(as_json=as_json)
    headings = {"row": "left", "predicted": "right", "unit": "left", "refused because": "left"}
    cells = [
        [each.id, "" if each.predicted is None else f"{each.predicted:,.4g}", each.unit, each.refused]
        for each in answers
    ]
    screen.print(table(f"Predictions for {cases}", headings, cells))
    counts = Counter(each.predicted is None for each in answers)
    screen.print(f"  {counts[False]} answered, {counts[True]} refused")
    rows = [
        {"id": each.id, "predicted": each.predicted, "unit": each.unit, "refused": each.refused or None}
        for each in answers
    ]
    show.write_csv(csv, rows, screen)
    if as_json:
        print_json({"rows": rows})
