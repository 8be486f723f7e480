"""`turnout bench overlap`: options in, tables out."""

from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json, table

EXAMPLES = """Examples:

turnout bench overlap --lab --rate 400 --delay 5

turnout bench overlap --hosts 1 --ranks 2 --tune
"""


def overlap(
    hosts: options.Hosts = 2,
    ranks: Annotated[int, typer.Option(help="Ranks of each host, of one thread each.", min=1)] = 1,
    lab: options.Lab = False,
    rate: options.Rate = 0.0,
    delay: options.Delay = 0.0,
    tokens: Annotated[int, typer.Option(help="Tokens of a rank.", min=1)] = 4096,
    dim: Annotated[int, typer.Option(help="Width.", min=1)] = 256,
    hidden: Annotated[int, typer.Option(help="Hidden width of an expert.", min=1)] = 512,
    experts: Annotated[int, typer.Option(help="Experts, on all ranks together.", min=1)] = 8,
    k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 2,
    chunks: Annotated[str, typer.Option(help="Comma-separated numbers of chunks.")] = "1,2,4,8",
    modes: Annotated[str, typer.Option(help="Comma-separated: forward, train (forward and backward).")] = (
        "forward,train"
    ),
    tune: Annotated[bool, typer.Option("--tune", help="Also let the tuner choose, and say why.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 10,
    warmup: Annotated[int, typer.Option(help="Rounds before them, which are not counted.", min=0)] = 2,
    as_json: options.Json = False,
) -> None:
    """An MoE layer whose experts lie on all ranks, in chunks: its step, its exchanges alone, its experts alone."""
    from turnout.bench.lab import Links
    from turnout.bench.overlap import run
    from turnout.bench.overlap_case import OverlapCase

    options.check_links(lab=lab, rate=rate, delay=delay)
    case = OverlapCase(
        hosts=hosts,
        ranks=ranks,
        lab=lab,
        links=Links(rate_mbit=rate, delay_ms=delay),
        tokens=tokens,
        dim=dim,
        hidden=hidden,
        experts=experts,
        k=k,
        chunks=options.whole_numbers("--chunks", chunks, example="1,4"),
        modes=options.words(modes),
        rounds=rounds,
        warmup=warmup,
        tune=tune,
    )
    result = run(case)
    screen = console(as_json=as_json)
    machine = result["machine"]
    screen.print(f"  {machine['processor']}, {machine['cores']} cores; {hosts} x {ranks} ranks of one thread")
    for mode in case.modes:
        screen.print(_table(mode, result["rows"]))
    for best in result["best"]:
        screen.print(f"  {_words(best)}", soft_wrap=True)
    if result["tuner"] is not None:
        screen.print(_tuned(result["tuner"]))
    if as_json:
        print_json(result)


def _table(mode: str, rows: list[dict[str, Any]]) -> Any:
    columns = {"chunks": "right", "step ms": "right", "min": "right", "exchanges ms": "right", "min ": "right"}
    columns |= {"experts ms": "right", "min  ": "right", "step / longer": "right", "uncut": "right"}
    columns |= {"sum / step": "right", "times as fast": "right"}
    of_mode = {(row["chunks"], row["peer"]): row for row in rows if row["mode"] == mode}
    cells = []
    for chunks in dict.fromkeys(chunks for chunks, _ in of_mode):
        parts = [of_mode[chunks, part] for part in ("step", "exchanges", "experts")]
        names = ("step_over_longer", "step_over_longer_uncut", "sum_over_step", "speedup_over_uncut")
        times = [f"{part[key]:.0f}" for part in parts for key in ("ms_median", "ms_min")]
        cells.append([f"{chunks}", *times, *(f"{parts[0][name]:.2f}" for name in names)])
    return table(f"{mode}: medians over rounds; longer: of exchanges and experts, also of those uncut", columns, cells)


def _words(best: dict[str, Any]) -> str:
    return (
        f"{best['mode']}: fastest in {best['chunks']} chunks: {best['step_over_longer']:.2f} times its "
        f"{best['longer']} alone, {best['step_over_longer_uncut']:.2f} times those uncut (one after the other both "
        f"are {best['uncut_sum_over_longer']:.2f} times that); {best['speedup_over_uncut']:.2f} times as fast as uncut"
    )


def _tuned(found: dict[str, Any]) -> Any:
    columns = {"chunks": "right", "layer predicted ms": "right", "step measured ms": "right", "steps": "right"}
    cells = [
        [
            f"{each['strategy']['overlap']}",
            f"{1e3 * each['predicted_s']:.1f}",
            "" if each["measured_s"] is None else f"{1e3 * each['measured_s']:.1f}",
            f"{each['steps']}",
            each["reason"],
        ]
        for each in found["candidates"]
    ]
    return table("What the tuner takes", columns | {"why": "left"}, cells)
