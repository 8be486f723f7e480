"""`turnout bench generate`: options in, a table for each model and batch out."""

from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, measured_on, number, print_json, table

EXAMPLES = "Example: turnout bench generate --models tiny --batches 1 --new 32 --json"


def generate(
    models: Annotated[str, typer.Option(help="Comma-separated: tiny, wide.")] = "tiny,wide",
    batches: Annotated[str, typer.Option(help="Comma-separated numbers of sequences, continued together.")] = "1,8",
    peers: Annotated[str, typer.Option(help="Comma-separated peers; empty: all.")] = "",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens that continue it.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 10,
    warmup: Annotated[int, typer.Option(help="Rounds before them, which are not counted.", min=0)] = 2,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Prompts continued: ours, ours with experts of 8 bits, and transformers' Mixtral of the same shape and weights."""
    from turnout.bench.generate import run
    from turnout.cli.process import own_process

    sizes = tuple(dict.fromkeys(options.whole_numbers("--batches", batches, example="1,8")))
    process = own_process(threads)
    asked = options.words(peers)
    result = run(
        options.words(models), peers=asked, batches=sizes, prompt=prompt, new=new, rounds=rounds, warmup=warmup
    )
    screen = console(as_json=as_json)
    screen.print(measured_on(process, result))
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["model"], row["batch"]) == (model, batch)]
        about = f"{model}, {rows[0]['params'] / 1e6:.1f} M parameters, batch {batch}"
        screen.print(_table(f"{about}: {prompt} tokens continued by {new}; medians (least-most)", rows))
    screen.print(
        "  * the peer, the faster of two; times: how many times as fast as it, medians within a round", soft_wrap=True
    )
    if as_json:
        print_json(result)


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    columns = {"": "left", "first token, ms": "right", "ms a token": "right", "tokens/s": "right"}
    columns |= {"times: first": "right", "later": "right"}
    cells = [
        [
            f"{row['peer']} *" if row["is_peer"] else row["peer"],
            _ms(row, "first", ".1f"),
            _ms(row, "token", ".2f"),
            f"{row['tokens_per_s']:,.0f}",
            *(number(row[f"speedup_over_peer_{part}"]) for part in ("first", "token")),
        ]
        for row in rows
    ]
    return table(title, columns, cells)


def _ms(row: dict[str, Any], part: str, form: str) -> str:
    median, least, most = (row[f"{part}_ms_{kind}"] for kind in ("median", "min", "max"))
    return f"{median:{form}} ({least:{form}}-{most:{form}})"
