"""`turnout bench alltoall`: options in, tables out."""

from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, number, print_json, table

EXAMPLES = """Examples:

turnout bench alltoall --hosts 2 --ranks 2 --bytes 16,4096

turnout bench alltoall --lab --rate 400 --packet-us 250 --bytes 16,1024,4096,16384,65536

turnout bench alltoall --lab --hosts 4 --ranks 2 --experts 64 --k 8 --tokens 256 --bytes 1024
"""


def alltoall(
    hosts: options.Hosts = 2,
    ranks: Annotated[int, typer.Option(help="Ranks of each host.", min=1)] = 4,
    lab: options.Lab = False,
    rate: options.Rate = 0.0,
    packet_us: Annotated[
        float, typer.Option(help="Microseconds a packet takes on the card on top. Needs --rate.")
    ] = 0.0,
    delay: options.Delay = 0.0,
    row_bytes: Annotated[str, typer.Option("--bytes", help="Comma-separated bytes of a token's row.")] = (
        "16,1024,4096,16384,65536"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens of a rank; 0: one for each expert.", min=0)] = 0,
    experts: Annotated[int, typer.Option(help="Experts; 0: one on each rank.", min=0)] = 0,
    k: Annotated[int, typer.Option(help="Experts of a token; of several, drawn at random.", min=1)] = 1,
    programs: Annotated[str, typer.Option(help="Comma-separated programs; empty: all, and all_gather.")] = "",
    share_memory: Annotated[
        bool, typer.Option("--share-memory", help="Also ranks of a host through memory they share.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before them, which are not counted.", min=0)] = 3,
    repeat: Annotated[int, typer.Option(help="Exchanges in a row in a round, of which the mean counts.", min=1)] = 1,
    as_json: options.Json = False,
) -> None:
    """All-to-all programs in turns: times beside the planner's, bytes by planner, ledger and kernel, rank by rank."""
    from turnout.bench.alltoall import run
    from turnout.bench.alltoall_case import ExchangeCase
    from turnout.bench.lab import Links

    options.check_links(lab=lab, rate=rate, delay=delay)
    case = ExchangeCase(
        hosts=hosts,
        ranks=ranks,
        lab=lab,
        links=Links(rate_mbit=rate, packet_us=packet_us, delay_ms=delay),
        programs=options.words(programs),
        row_bytes=options.whole_numbers("--bytes", row_bytes, example="16,4096"),
        tokens=tokens,
        experts=experts,
        k=k,
        share_memory=share_memory,
        rounds=rounds,
        warmup=warmup,
        repeat=repeat,
    )
    result = run(case)
    screen = console(as_json=as_json)
    machine = result["machine"]
    screen.print(f"  {machine['processor']}, {machine['cores']} cores; {hosts} x {ranks} ranks of one thread")
    for size in case.row_bytes:
        screen.print(_times(size, result))
    screen.print(_bytes(result))
    for each in result["crossover"]:
        measured, planned = (_words(each["program"], each[how]) for how in ("measured", "planned"))
        off = " or ".join(f"{size:,.0f} B" if size else "never" for size in _off(each))
        screen.print(f"  measured: {measured}; planned: {planned}; a percent off: {off}", soft_wrap=True)
    if as_json:
        print_json(result)


def _times(size: int, result: dict[str, Any]) -> Any:
    """`wire` the collectives alone; `rows` with the picking and ordering of rows that a layer does."""
    of_size = [row for row in result["rows"] if row["row_bytes"] == size]
    by_name = {(row["peer"], row["mode"]): row for row in of_size}
    columns = {"program": "left", "wire ms": "right", "min": "right", "max": "right", "planned": "right"}
    columns |= {"times as fast as flat": "right", "rows ms": "right", "as fast": "right"}
    if any(row["mode"] == "shared_wire" for row in of_size):
        columns |= {"by memory": "right", "times as fast as gloo": "right"}
    cells = []
    for name in dict.fromkeys(row["peer"] for row in of_size):
        wire, rows, shared = by_name[name, "wire"], *(by_name.get((name, mode)) for mode in ("rows", "shared_wire"))
        cells.append(
            [
                name,
                *(number(wire[key]) for key in ("ms_median", "ms_min", "ms_max", "planned_ms", "speedup_over_flat")),
                *(number(rows[key] if rows else None) for key in ("ms_median", "speedup_over_flat")),
                *(number(shared[key] if shared else None) for key in ("ms_median", "speedup_over_gloo")),
            ][: len(columns)]
        )
    return table(f"A dispatch of rows of {size:,} bytes", columns, sorted(cells))


def _bytes(result: dict[str, Any]) -> Any:
    headings = ("row", "inside", "between", "sends in", "between ", "copies", "expected", "equal")
    columns = {"program": "left"} | dict.fromkeys(headings, "right")
    cells = [
        [
            each["program"],
            *(
                f"{each[key]:,}"
                for key in ("row_bytes", "intra_bytes", "inter_bytes", "intra_messages", "inter_messages")
            ),
            *(f"{each[key]:.2f}" for key in ("copies_between_hosts", "copies_expected")),
            f"{each['pairs_equal']}",
        ]
        for each in result["traffic"]
    ]
    return table(
        "Bytes and messages there and back; copies of a token between hosts; pairs counted alike by all three",
        columns,
        cells,
    )


def _off(each: dict[str, Any]) -> list[float | None]:
    """Where flat and the program would change places if their planned ratio were a percent lower, or higher."""
    return [change["row_bytes"] for change in each["planned_a_percent_off"]]


def _words(program: str, change: dict[str, Any]) -> str:
    small, size = change["small"], change["row_bytes"]
    other = program if small == "flat" else "flat"
    if size is None:
        return f"{small} is faster than {other} at all sizes"
    return f"{small} is faster than {other} below {size:,.0f} bytes a row"
