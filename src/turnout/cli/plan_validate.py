"""`turnout plan validate`: the planner's error on published measurements."""

from pathlib import Path
from typing import Annotated, Any

import typer

from turnout.cli import options, plan_options

CaseFile = Annotated[
    Path | None,
    typer.Option(
        "--cases", help="Judge on this file in the schema of published_cases.json instead.", metavar="FILE"
    ),
]  # fmt: skip
Refused = Annotated[bool, typer.Option("--refused", help="Also name every refused row and why.")]

# validation rows no fit saw; of calibration rows those of the newest release of a framework are fitted on
SPLITS = {"validation": "judged", "calibration": "fitted"}
READING = (
    "judged: rows no fit saw; fitted: calibration rows; older: of an older release; sanity: too unlike to count",
    "simulated: what another simulator answered, no measurement",
    "skill: 1 - MAPE / that of one constant MFU fitted on calibration rows; bias: of time, above 0 is too slow",
    "rank: Spearman over layouts of one job; regret: time of the predicted best over the measured best, less 1",
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout plan validate --json")(validate)


def validate(
    cases: CaseFile = None, refused: Refused = False, csv: plan_options.Csv = None, as_json: options.Json = False
) -> None:
    """Predicted against measured, suite by suite, beside one constant MFU and other planners; memory, out-of-memory."""
    import time

    from turnout.cli import plan_print
    from turnout.cli.console import print_json
    from turnout.plan.cases import read_cases
    from turnout.plan.validate import to_json
    from turnout.plan.validate import validate as report_on

    started = time.perf_counter()
    report = report_on(None if cases is None else read_cases(cases))
    seconds = time.perf_counter() - started
    screen = plan_print.wide_console(as_json=as_json)
    screen.print(_suites(report))
    _print_rest(screen, report)
    if refused:
        screen.print(_refusals(report))
    screen.print(f"  {sum(each.refused for each in report.suites)} rows refused; {seconds:.1f} s")
    document: dict[str, Any] = to_json(report) | {"seconds": seconds}
    plan_print.write_csv(csv, document["suites"], screen)
    if as_json:
        print_json(document)


def _suites(report: Any) -> Any:
    from turnout.cli.console import number, table
    from turnout.cli.plan_print import columns, percent

    headings = columns(
        ("suite", "split"),
        ("rows", "refused", "MAPE", "median", "P90", "worst", "bias", "const. MFU", "skill", "rank", "regret"),
    ) | {"another tool": "left"}
    cells = [
        [
            each.suite, SPLITS.get(each.split, each.split), str(each.n), str(each.refused or ""), percent(each.mape),
            percent(each.median), percent(each.p90), percent(each.max), percent(each.bias, signed=True),
            percent(each.constant_mfu), number(each.skill), number(each.spearman), percent(each.regret),
            f"{each.peer} {percent(each.peer_mape)} on {each.peer_n}" if each.peer else "",
        ]
        for each in sorted(report.suites, key=lambda each: each.split not in ("", "validation"))
    ]  # fmt: skip
    return table("Error of predicted time, rate or share, by suite", headings, cells)


def _print_rest(screen: Any, report: Any) -> None:
    from turnout.cli.console import number, table
    from turnout.cli.plan_print import columns, percent
    from turnout.plan.validate import APART

    if report.dense_mape is not None:
        screen.print(f"  all dense rows no fit saw, {' and '.join(APART)} apart: {percent(report.dense_mape)}")
    for line in READING:
        screen.print(f"  {line}", soft_wrap=True)
    if report.memory:
        screen.print()
        cells = [
            [
                each.suite,
                each.what,
                str(each.n),
                percent(each.mape),
                percent(each.median),
                percent(each.bias, signed=True),
            ]
            for each in report.memory
        ]
        screen.print(
            table("Error of predicted memory", columns(("suite", "what"), ("rows", "MAPE", "median", "bias")), cells)
        )
    if report.oom:
        screen.print()
        headings = columns(("suite",), ("runs", "refused", "precision", "recall", "F1"))
        cells = [
            [
                each.suite,
                str(each.n),
                str(each.refused),
                number(each.precision),
                number(each.recall),
                number(each.f1),
            ]
            for each in report.oom
        ]
        screen.print(table("Out of memory, predicted", headings, cells))


def _refusals(report: Any) -> Any:
    from turnout.cli.console import table

    headings = {"suite": "left", "row": "left", "refused because": "left"}
    # of runs out of memory some are refused as runs that were timed, too
    failed = [(f"{each.suite}, out of memory", *row) for each in report.oom for row in each.refusals]
    named = {row for _, row, _ in report.refusals}
    cells = [*report.refusals, *(row for row in failed if row[1] not in named)]
    return table("Refused", headings, [list(row) for row in cells])
