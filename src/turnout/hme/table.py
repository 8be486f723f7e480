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


@dataclass(frozen=True, kw_only=True, eq=False)
class DataTable:
    """Inputs by name, and the target as it was written."""

    names: tuple[str, ...]
    x_ND: Floats
    target: str
    y_text: tuple[str, ...]
    notes: tuple[str, ...]  # what was done to columns, for people

    @property
    def is_numeric(self) -> bool:
        """Whether every target is a number."""
        return all(_number(text) is not None for text in self.y_text)

    @property
    def y_N(self) -> Floats:
        return np.array([_number(text) for text in self.y_text], dtype=np.float64)

    @property
    def first_missing(self) -> tuple[int, str] | None:
        """Line and column of the first input that is missing; None where all are there."""
        missing = np.argwhere(np.isnan(self.x_ND))
        return None if not len(missing) else (int(missing[0, 0]) + 2, self.names[missing[0, 1]])


def read_table(path: Path, target: str) -> DataTable:
    """The table in `path`, whose first line names its columns.

    Raises: DataError for a file that is no table, has no rows, or a column that is neither numbers nor a few words;
    ConfigError if no column is called `target`.
    """
    header, lines = _read(path)
    apart = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if apart is not None:
        raise DataError(f"{path} has its cells between {apart!r}; write it with commas between them")
    if target not in header:
        raise ConfigError(
            f"--target {target!r} is no column of {path}; columns: {', '.join(header)}{nearest(target, header)}"
        )
    columns = {name: [line[i].strip() for line in lines] for i, name in enumerate(header)}
    for name, cells in columns.items():
        line = next((n for n, cell in enumerate(cells, start=2) if _is_infinite(cell)), None)
        if line is not None:
            raise DataError(f"{path} line {line}: column {name!r} is infinite; leave such lines out")
    y_text = columns.pop(target)
    blank = next((n for n, text in enumerate(y_text) if text.lower() in MISSING), None)
    if blank is not None:
        raise DataError(f"{path} line {blank + 2}: the target {target!r} is missing; leave such lines out")
    names, arrays, notes = [], [], []
    for name, cells in columns.items():
        own_names, array, note = _column(path, name, cells)
        names, arrays, notes = names + own_names, [*arrays, array], notes + note
    if not names:
        raise DataError(f"{path} has no column beside the target {target!r}")
    return DataTable(
        names=tuple(names), x_ND=np.hstack(arrays), target=target, y_text=tuple(y_text), notes=tuple(notes)
    )


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *lines = [line for line in csv.reader(file) if line] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    header = [name.strip() for name in header]
    if not lines:
        raise DataError(f"{path} has no rows below its first line, which names the columns")
    if len(set(header)) != len(header):
        raise DataError(f"{path} names a column twice: {', '.join(header)}")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise DataError(f"{path} line {number} has {len(line)} cells; the first line names {len(header)} columns")
    return header, lines


def _column(path: Path, name: str, cells: list[str]) -> tuple[list[str], Floats, list[str]]:
    """Names, values (N, columns) and notes; a missing number is NaN."""
    numbers = [np.nan if cell.lower() in MISSING else _number(cell) for cell in cells]
    if None not in numbers:
        return [name], np.array(numbers, dtype=np.float64)[:, None], []
    values = sorted(set(cells))
    if len(values) > MOST_VALUES:
        line = numbers.index(None) + 2
        raise DataError(
            f"{path} line {line}: column {name!r} has {cells[line - 2]!r}, which is no number, and {len(values)} "
            f"different values; a column of words may have {MOST_VALUES}. Remove the column, or group its values"
        )
    one_hot = np.array(cells)[:, None] == np.array(values)
    return (
        [f"{name}={value}" for value in values],
        one_hot.astype(np.float64),
        [f"{name}: {len(values)} words, a column each"],
    )


def _is_infinite(text: str) -> bool:
    number = _number(text)
    return number is not None and math.isinf(number)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
