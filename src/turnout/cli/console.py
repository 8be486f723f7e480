"""What a person sees goes to stderr under --json, so that stdout ends in one JSON object."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    # imported when something is printed
    from rich.console import Console
    from rich.table import Table


def console(*, as_json: bool, quiet: bool = False) -> "Console":
    """Where a verb prints for people. Text is shown as it is: a path may hold what rich reads as markup or an emoji."""
    from rich.console import Console

    return Console(stderr=as_json, markup=False, emoji=False, highlight=False, quiet=quiet)


def patient_console(*, as_json: bool, quiet: bool = False) -> "Console":
    """The same for work that must not be lost with its reader (head, a closed terminal): it goes on unseen."""
    screen = console(as_json=as_json, quiet=quiet)
    screen.file = cast(TextIO, _Patient(screen.file))
    return screen


class _Patient:
    """A stream that nobody has to read."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unread():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unread():
            self._stream.flush()

    @contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # what is still in the stream goes where nothing fails, now and when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def print_error(text: str) -> None:
    """One line on stderr."""
    from rich.text import Text

    console(as_json=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """The last line under --json; a number that is not finite, which JSON has not, is null."""
    print(json.dumps(_finite(value), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def measured_on(process: str, result: Mapping[str, Any]) -> str:
    """The line above a benchmark's tables: how its process is set up, and the machine."""
    machine = result["machine"]
    return f"  {process}; {machine['processor']}, {machine['cores']} cores"


def number(value: float | None, form: str = ".2f") -> str:
    """A cell of a table; empty where there is nothing."""
    return "" if value is None else f"{value:{form}}"


def write_pieces(out: TextIO, pieces: Iterable[str]) -> str:
    """Write text as it comes and return all of it; not through rich, which wraps lines and reads :x: as an emoji."""
    written = []
    for piece in pieces:
        written.append(piece)
        out.write(piece)
        out.flush()
    out.write("\n")
    return "".join(written)


def table(title: str, columns: dict[str, str], rows: list[list[str]]) -> "Table":
    """A table with (heading -> justification) columns; the first one, which names the rows, is the last to be broken.

    Where the screen is narrow, words go to the next line; none is cut.
    """
    from rich.table import Table

    built = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for number, (heading, justify) in enumerate(columns.items()):
        built.add_column(heading, justify=justify, overflow="fold", no_wrap=number == 0)  # pyright: ignore[reportArgumentType]
    for row in rows:
        built.add_row(*row)
    return built
