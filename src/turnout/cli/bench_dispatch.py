"""`turnout bench dispatch`: options in, the tables of Tutel's comparison out."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, measured_on, number, print_json, table

EXAMPLES = "Example: turnout bench dispatch --tokens 1024,8192 --modes layer --no-memory --json"
TITLES = {
    "forward": "rows and back, forward",
    "train": "rows and back, forward and backward",
    "layer": "a whole layer after its router, forward and backward",
}


def dispatch(
    tokens: Annotated[str, typer.Option(help="Comma-separated numbers of tokens of a call.")] = (
        "1024,2048,4096,8192,16384,32768"
    ),
    modes: Annotated[str, typer.Option(help="Comma-separated: forward, train, layer.")] = "forward,train,layer",
    dim: Annotated[int, typer.Option(help="Width.")] = 1024,
    hidden: Annotated[int, typer.Option(help="Hidden width of an expert.")] = 1024,
    experts: Annotated[int, typer.Option(help="Experts.")] = 16,
    k: Annotated[int, typer.Option(help="Experts of a token.")] = 2,
    factor: Annotated[float, typer.Option(help="Slots of experts over the balanced load.")] = 1.0,
    bound_gib: Annotated[float, typer.Option(help="Dense masks that need more GiB are not made.")] = 4.0,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them, which are not counted.", min=0)] = 1,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = True,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Tokens to experts' rows and back: dense masks (GShard), sorting, and as a layer here does it (Tutel's tables)."""
    from turnout.bench.dispatch import DispatchCase, run
    from turnout.cli.process import own_process

    case = DispatchCase(
        tokens=tuple(dict.fromkeys(options.whole_numbers("--tokens", tokens, example="1024,8192"))),
        dim=dim,
        hidden=hidden,
        experts=experts,
        k=k,
        factor=factor,
        bound_gib=bound_gib,
    )
    process = own_process(threads)
    result = run(case, modes=options.words(modes), rounds=rounds, warmup=warmup, memory=memory)
    screen = console(as_json=as_json)
    screen.print(measured_on(process, result))
    for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["mode"] == mode]
        if memory:
            screen.print(_memory(f"Memory in MiB above weights and tokens: {TITLES[mode]}", rows, dim))
        screen.print(_times(f"Median ms: {TITLES[mode]}", rows))
    if memory:
        screen.print(
            "  paper: Tutel's tables 5 and 9, GiB of a layer on GPUs with as many tokens over the width", soft_wrap=True
        )
    if as_json:
        print_json(result)


def _memory(title: str, rows: Sequence[dict[str, Any]], dim: int) -> Any:
    from turnout.bench.dispatch import PAPER, PAPER_DIM

    peers = _peers(rows)
    columns = {"tokens": "right", **dict.fromkeys(peers, "right"), "saving": "right"}
    columns |= {"paper: tokens": "right", "Fairseq": "right", "Tutel": "right", "saving ": "right"}
    cells = []
    for tokens, of_size in _by_tokens(rows).items():
        # a size between the paper's has no row of it
        paper = PAPER.get(tokens // dim) if tokens % dim == 0 else None
        said = [] if paper is None else [f"{tokens // dim * PAPER_DIM:,}", *(f"{gib:.1f}" for gib in paper)]
        saved = [*(["", "", ""] if paper is None else said), "" if paper is None else _saving(*paper)]
        held = [_held(of_size[peer]) for peer in peers]
        cells.append([f"{tokens:,}", *held, _saved(of_size), *saved])
    return table(title, columns, cells)


def _times(title: str, rows: Sequence[dict[str, Any]]) -> Any:
    peers = _peers(rows)
    columns = {"tokens": "right", **dict.fromkeys(peers, "right")}
    columns |= {f"over {peer}": "right" for peer in peers[:-1]}
    cells = [
        [
            f"{tokens:,}",
            *(_ms(of_size[peer]) for peer in peers),
            *(number(of_size[peer]["speedup_of_turnout"]) for peer in peers[:-1]),
        ]
        for tokens, of_size in _by_tokens(rows).items()
    ]
    return table(title, columns, cells)


def _peers(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["peer"] for row in rows))


def _by_tokens(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    return {
        tokens: {row["peer"]: row for row in rows if row["tokens"] == tokens}
        for tokens in dict.fromkeys(row["tokens"] for row in rows)
    }


def _held(row: dict[str, Any]) -> str:
    if row["outcome"] != "measured":
        return f"out of bound: {row['masks_mib']:,.0f}"
    return "" if row["extra_mib"] is None else f"{row['extra_mib']:,.0f}"


def _ms(row: dict[str, Any]) -> str:
    if row["ms_median"] is None:
        return "out of bound"
    median, least, most = (row[f"ms_{kind}"] for kind in ("median", "min", "max"))
    return f"{median:,.0f} ({least:,.0f}-{most:,.0f})"


def _saved(of_size: dict[str, dict[str, Any]]) -> str:
    """What ours saves of dense masks: of what they are known to take where they were not made."""
    from turnout.bench.dispatch_ways import DENSE, OURS

    dense, ours = of_size[DENSE], of_size[OURS]["extra_mib"]
    whole = dense["extra_mib"] if dense["outcome"] == "measured" else dense["masks_mib"]
    if ours is None or whole is None:
        return ""
    return ("" if dense["outcome"] == "measured" else "over ") + _saving(whole, ours)


def _saving(whole: float, part: float) -> str:
    return f"{100 * (1 - part / whole):.1f}%"
