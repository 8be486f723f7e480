"""What a person sees goes to stderr under --json, so that stdout ends in one JSON object."""

import json
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text


def console(*, as_json: bool, quiet: bool = False) -> Console:
    """Where a verb prints for people. Text is shown as it is: a path may hold what rich reads as markup or an emoji."""
    return Console(stderr=as_json, markup=False, emoji=False, highlight=False, quiet=quiet)


def print_error(text: str) -> None:
    """One line on stderr."""
    console(as_json=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """The last line under --json."""
    print(json.dumps(value), flush=True)


def write_pieces(out: TextIO, pieces: Iterable[str]) -> str:
    """Write text as it comes and return all of it; not through rich, which wraps lines and reads :x: as an emoji."""
    written = []
    for piece in pieces:
        written.append(piece)
        out.write(piece)
        out.flush()
    out.write("\n")
    return "".join(written)


def table(title: str, columns: dict[str, str], rows: list[list[str]]) -> Table:
    """A table with (heading -> justification) columns."""
    built = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for heading, justify in columns.items():
        built.add_column(heading, justify=justify)  # pyright: ignore[reportArgumentType]
    for row in rows:
        built.add_row(*row)
    return built
