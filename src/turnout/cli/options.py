"""Options that several verbs share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a field of the recipe: a.b=value. May be repeated.", metavar="A.B=V"),
]
Data = Annotated[str | None, typer.Option("--data", help="Corpus by name, or a file, folder or glob of your own text.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0: all cores.", min=0)]
RunFolder = Annotated[Path, typer.Argument(help="A run folder written by `turnout train`.", show_default=False)]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token; higher: more surprising.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Sample among this many likeliest tokens; 0: all.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", help="Sample among the likeliest tokens of this total probability.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text. May be repeated.")]
Quantize = Annotated[
    str,
    typer.Option(
        help="Experts in 8 bits: int8, or int8-a8 with activations of 8 bits too, less exact and, without AMX, faster; "
        "fp8 for a GPU."
    ),
]
Hosts = Annotated[int, typer.Option(help="Hosts; without --lab only groups of ranks.", min=1)]
Lab = Annotated[
    bool,
    typer.Option("--lab", help="Emulated hosts with links between them: Linux, iproute2, root or user namespaces."),
]
Rate = Annotated[float, typer.Option(help="Mbit/s of a host's card, each way; 0: unlimited. Needs --lab.")]
Delay = Annotated[float, typer.Option(help="Milliseconds one way between hosts. Needs --lab and iptables.")]


def words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def whole_numbers(name: str, text: str, *, example: str) -> tuple[int, ...]:
    """Of an option called `name`.

    Raises: ConfigError if something else than positive whole numbers stands between the commas, or nothing.
    """
    from turnout.errors import ConfigError

    found = words(text)
    if not found or not all(word.isascii() and word.isdigit() and int(word) for word in found):
        raise ConfigError(f"{name} {text!r} must be whole numbers with commas between them, such as {example}")
    return tuple(map(int, found))


def check_links(*, lab: bool, rate: float, delay: float) -> None:
    """Raises: ConfigError if links are described that only a lab has."""
    from turnout.errors import ConfigError

    if (rate or delay) and not lab:
        raise ConfigError(f"--rate {rate:g} and --delay {delay:g} are of a lab's links; add --lab, or leave them out")


def recipe_overrides(settings: list[str] | None, data: str | None) -> list[str]:
    """`--data X` is `--set data.corpus=X`."""
    # a quoted TOML string: a path may hold anything
    quoted = [] if data is None else [f"data.corpus='{data}'" if "'" not in data else f"data.corpus={data}"]
    return [*(settings or []), *quoted]
