"""`turnout bench copies`: a skewed load with and without copies of experts."""

from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, measured_on, print_json, table

EXAMPLES = "Example: turnout bench copies --ranks 4 --experts 32 --copies 4,8 --skew 1.2"


def copies(
    ranks: Annotated[int, typer.Option(help="Ranks, over which the experts lie.", min=2)] = 2,
    experts: Annotated[int, typer.Option(help="Experts.", min=2)] = 16,
    number: Annotated[
        str, typer.Option("--copies", help="Comma-separated numbers of copies, over all ranks: a placement for each.")
    ] = "4",
    skew: Annotated[float, typer.Option(help="Expert e's load falls as 1 / (e + 1)^skew.", min=0)] = 1.0,
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.", min=1)] = 2048,
    dim: Annotated[int, typer.Option(help="Width.", min=1)] = 256,
    hidden: Annotated[int, typer.Option(help="Hidden width of an expert.", min=1)] = 512,
    k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before them, which are not counted.", min=0)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of a rank; 0: the cores shared out.", min=0)] = 0,
    as_json: options.Json = False,
) -> None:
    """A layer with a skewed load on ranks of this machine: experts in order, searched, and with copies."""
    from turnout.bench.copies import CopiesCase, run
    from turnout.cli.process import own_process

    numbers = options.whole_numbers("--copies", number, example="4,8") if number else ()
    case = CopiesCase(
        ranks=ranks,
        tokens=tokens,
        dim=dim,
        hidden=hidden,
        experts=experts,
        k=k,
        skew=skew,
        copies=tuple(dict.fromkeys(numbers)),
    )
    process = own_process(threads)
    result = run(case, rounds=rounds, warmup=warmup, threads=threads)
    screen = console(as_json=as_json)
    screen.print(measured_on(process, result))
    for mode, title in (("forward", "Forward"), ("train", "Forward, backward and sum over ranks")):
        screen.print(_table(f"{title}, {ranks} ranks", [row for row in result["rows"] if row["mode"] == mode]))
    screen.print("  fullest rank: rows over the mean of ranks; bytes: of all ranks, of one pass", soft_wrap=True)
    if as_json:
        print_json(result)


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    columns = {"experts": "left", "fullest rank": "right", "median ms": "right", "of in order": "right"}
    columns |= {"rows' bytes": "right", "copies' gradients": "right", "experts of a rank": "right"}
    cells = []
    for row in rows:
        low, high = row["ratio_to_in_order_quartiles"]
        cells.append(
            [
                row["peer"],
                f"{row['max_load']:.3f}",
                f"{row['ms_median']:.1f}",
                f"{row['ratio_to_in_order']:.2f} ({low:.2f}-{high:.2f})",
                *(f"{row[name]:,}" for name in ("row_bytes", "copy_bytes", "weight_bytes")),
            ]
        )
    return table(title, columns, cells)
