"""A CSV file as numbers: columns of text become one column for each of their values."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turnout.errors import ConfigError, DataError
from turnout.hme.tree import Floats
from turnout.registry import nearest

MOST_VALUES = 20  # that a column of text may have to become columns of its own
MISSING = ("", "na", "nan", "null", "none", "?")
NO_WORD = "(missing)"  # what a missing word is called


@dataclass(frozen=True, kw_only=True, eq=False)
class DataTable:
    """Inputs by name, and the target as it was written."""

    names: tuple[str, ...]
    x_ND: Floats
    target: str
    y_text: tuple[str, ...]
    line_N: tuple[int, ...]  # of the file, on which each row begins
    notes: tuple[str, ...]  # what was done to columns, for people

    @property
    def is_numeric(self) -> bool:
        """Whether every target is a number."""
        return self.first_word is None

    @property
    def y_N(self) -> Floats:
        return np.array([_number(text) for text in self.y_text], dtype=np.float64)

    @property
    def first_word(self) -> tuple[int, str] | None:
        """Line and text of the first target that is no number; None where all are numbers."""
        words = ((line, text) for line, text in zip(self.line_N, self.y_text, strict=True) if _number(text) is None)
        return next(words, None)

    @property
    def first_missing(self) -> tuple[int, str] | None:
        """Line and column of the first input that is missing; None where all are there."""
        missing = np.argwhere(np.isnan(self.x_ND))
        return None if not len(missing) else (self.line_N[missing[0, 0]], self.names[missing[0, 1]])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sheet:
    """The cells of a file, stripped, by column."""

    path: Path
    columns: dict[str, list[str]]
    line_N: tuple[int, ...]
    notes: tuple[str, ...]


def read_table(path: Path, target: str) -> DataTable:
    """The table in `path`, whose first line names its columns.

    Raises: DataError for a file that is no table, has no rows, or a column that is neither numbers nor a few words;
    ConfigError if no column is called `target`.
    """
    sheet = _read(path)
    columns, header = dict(sheet.columns), list(sheet.columns)
    apart = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if apart is not None:
        raise DataError(f"{path} has its cells between {apart!r}; write it with commas between them")
    if target not in header:
        raise ConfigError(
            f"--target {target!r} is no column of {path}; columns: {', '.join(header)}{nearest(target, header)}"
        )
    for name, cells in columns.items():
        line = next((n for n, cell in zip(sheet.line_N, cells, strict=True) if _is_infinite(cell)), None)
        if line is not None:
            raise DataError(f"{path} line {line}: column {name!r} is infinite; leave such lines out")
    y_text = columns.pop(target)
    blank = next((n for n, text in zip(sheet.line_N, y_text, strict=True) if _is_missing(text)), None)
    if blank is not None:
        raise DataError(f"{path} line {blank}: the target {target!r} is missing; leave such lines out")
    names, arrays, notes = [], [], [*sheet.notes]
    for name, cells in columns.items():
        own_names, array, note = _column(sheet, name, cells)
        names, arrays, notes = names + own_names, [*arrays, array], notes + note
    if not names:
        raise DataError(f"{path} has no column beside the target {target!r}")
    return DataTable(
        names=tuple(names), x_ND=np.hstack(arrays), target=target, y_text=tuple(y_text), line_N=sheet.line_N,
        notes=tuple(notes),
    )  # fmt: skip


def _read(path: Path) -> _Sheet:
    lines, line_N = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader, begins = csv.reader(file), 1
            for line in reader:
                if line:
                    lines.append(line)
                    line_N.append(begins)
                # a cell in quotes may go on over several lines
                begins = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: {error}; save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(lines) < 2:
        raise DataError(f"{path} has no rows below its first line, which names the columns")
    given, rows = [name.strip() for name in lines[0]], lines[1:]
    header = [name or f"column {number}" for number, name in enumerate(given, start=1)]
    if len(set(header)) != len(header):
        raise DataError(f"{path} names a column twice: {', '.join(header)}")
    for number, row in zip(line_N[1:], rows, strict=True):
        if len(row) != len(header):
            raise DataError(f"{path} line {number} has {len(row)} cells; the first line names {len(header)} columns")
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    notes = tuple(f"{own} has no name in the first line" for own, name in zip(header, given, strict=True) if not name)
    return _Sheet(path=path, columns=columns, line_N=tuple(line_N[1:]), notes=notes)


def _column(sheet: _Sheet, name: str, cells: list[str]) -> tuple[list[str], Floats, list[str]]:
    """Names, values (N, columns) and notes; a missing number is NaN, a missing word a word of its own."""
    numbers = [np.nan if _is_missing(cell) else _number(cell) for cell in cells]
    if None not in numbers:
        return [name], np.array(numbers, dtype=np.float64)[:, None], []
    words = [NO_WORD if _is_missing(cell) else cell for cell in cells]
    values, num_missing = sorted(set(words)), words.count(NO_WORD)
    if len(values) > MOST_VALUES:
        row = numbers.index(None)
        raise DataError(
            f"{sheet.path} line {sheet.line_N[row]}: column {name!r} has {cells[row]!r}, which is no number, and "
            f"{len(values)} different values; a column of words may have {MOST_VALUES}. Remove the column, or group "
            "its values"
        )
    one_hot = np.array(words)[:, None] == np.array(values)
    missing = f"; missing is one of them ({num_missing} rows)" if num_missing else ""
    return (
        [f"{name}={value}" for value in values],
        one_hot.astype(np.float64),
        [f"{name}: {len(values)} words, a column each{missing}"],
    )


def _is_missing(text: str) -> bool:
    return text.lower() in MISSING


def _is_infinite(text: str) -> bool:
    number = _number(text)
    return number is not None and math.isinf(number)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
