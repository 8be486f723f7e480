"""`turnout bench tuner`: options in, tables out."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from turnout.cli import options
from turnout.cli.console import console, print_json, table

EXAMPLES = """Examples:

turnout bench tuner --lab --rate 400 --delay 1 --out strategies.json

turnout tune --explain strategies.json
"""


def tuner(
    hosts: options.Hosts = 2,
    ranks: Annotated[int, typer.Option(help="Ranks of each host, of one thread each.", min=1)] = 2,
    lab: options.Lab = False,
    rate: options.Rate = 0.0,
    delay: options.Delay = 0.0,
    etp: Annotated[int, typer.Option(help="Neighbouring ranks that share an expert.", min=1)] = 2,
    dim: Annotated[int, typer.Option(help="Width.", min=1)] = 256,
    hidden: Annotated[int, typer.Option(help="Hidden width of an expert.", min=1)] = 192,
    experts: Annotated[int, typer.Option(help="Experts.", min=1)] = 4,
    k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 2,
    least: Annotated[int, typer.Option(help="Least rows of an expert; most are 4.38 times as many.", min=1)] = 512,
    levels: Annotated[int, typer.Option(help="Levels of the schedule.", min=2)] = 4,
    hold: Annotated[int, typer.Option(help="Steps of a level before the next.", min=1)] = 5,
    periods: Annotated[int, typer.Option(help="Times up and down.", min=1)] = 1,
    then_rate: Annotated[
        float, typer.Option(help="Mbit/s of a second schedule, which nobody is told of; 0: none. Needs --rate.", min=0)
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Write the dictionary there, for `turnout tune --explain`.")] = None,
    as_json: options.Json = False,
) -> None:
    """The tuner over a schedule of rows, against every static choice and against who knows the best of each step."""
    from turnout.bench.lab import Links
    from turnout.bench.schedule import run
    from turnout.bench.schedule_case import ScheduleCase

    options.check_links(lab=lab, rate=rate, delay=delay)
    case = ScheduleCase(
        hosts=hosts,
        ranks=ranks,
        lab=lab,
        links=Links(rate_mbit=rate, delay_ms=delay),
        etp=etp,
        dim=dim,
        hidden=hidden,
        experts=experts,
        k=k,
        least=least,
        levels=levels,
        hold=hold,
        periods=periods,
        then_mbit=then_rate,
    )
    result = run(case, out)
    screen = console(as_json=as_json)
    machine = result["machine"]
    screen.print(f"  {machine['processor']}, {machine['cores']} cores; {hosts} x {ranks} ranks of one thread")
    _print(result, screen)
    if result["then"] is not None:
        screen.print(f"  then at {then_rate:g} Mbit/s, of which nobody was told:")
        _print(result["then"], screen)
    if as_json:
        print_json(result)


def _print(found: dict[str, Any], screen: Console) -> None:
    learning = found["learning"]
    state = "warm" if learning["warm"] else "not all tried"
    screen.print(f"  learned in {learning['steps']} steps, {learning['seconds']:.0f} s: {state}")
    screen.print(_totals(found["rows"]))
    screen.print(_levels(found["levels"]))
    screen.print(f"  {_words(found)}", soft_wrap=True)


def _totals(rows: list[dict[str, Any]]) -> Any:
    columns = {"choice": "left", "seconds": "right", "over the best of each step": "right", "by medians": "right"}
    cells = [
        [row["peer"], f"{row['total_s']:.2f}", f"{row['over_oracle']:.3f}", f"{row['over_oracle_by_medians']:.3f}"]
        for row in sorted(rows, key=lambda row: row["total_s"])
    ]
    return table("The whole schedule", columns, cells)


def _levels(levels: list[dict[str, Any]]) -> Any:
    columns = {"rows an expert": "right", "best": "left", "ms": "right", "worst": "left", "ms ": "right"}
    cells = [
        [
            f"{each['rows_an_expert']:.0f}",
            each["best"],
            f"{each['best_ms']:.1f}",
            each["worst"],
            f"{each['worst_ms']:.1f}",
            ", ".join(f"{name} ({times})" for name, times in each["taken"].items()),
        ]
        for each in levels
    ]
    return table("Level by level, medians", columns | {"the tuner took": "left"}, cells)


def _words(result: dict[str, Any]) -> str:
    middle = result["by_medians"]
    return (
        f"the tuner takes {result['tuner_over_oracle']:.3f} times the best of each step "
        f"({middle['tuner_over_oracle']:.3f} by medians), {result['tuner_over_best_static']:.3f} times the best static "
        f"choice; the worst one takes {result['worst_static_over_tuner']:.2f} times as long as the tuner"
    )
