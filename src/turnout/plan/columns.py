"""Many layouts of one job at once: columns of field values, and terms computed once for all layouts alike in them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from turnout.plan.job import Job
from turnout.plan.terms import Terms
from turnout.strategy import Strategy

S = TypeVar("S")
Codes = NDArray[np.integer[Any]]
PIPELINE = ("pp", "virtual_stages", "schedule")  # what formulas read of a layout itself, not through terms
_FIELDS = {field.name for field in fields(Strategy)}
ROWS = 1 << 15  # layouts a formula sees at once: their arrays stay in a core's cache


@dataclass(frozen=True, kw_only=True, eq=False)
class Layouts:
    """Layouts of `job` that differ in some fields; those of one pipeline lie next to each other."""

    job: Job  # of one of them
    options: Mapping[str, Sequence[Any]]  # field -> values it takes; also "tokens" and "micro_batches"
    codes: Mapping[str, Codes]  # field -> which of these each layout has

    def __len__(self) -> int:
        return len(self.codes["pp"])

    def strategy(self, row: int) -> Strategy:
        """The layout of a row, dp filled in."""
        changed = {name: value for name, value in self.fields(row).items() if name in _FIELDS}
        dense = changed["tp"] * changed["cp"] * changed["pp"]
        return replace(self.job.strategy, dp=self.job.world // dense, **changed)

    def fields(self, row: int) -> dict[str, Any]:
        """The values of a row by name."""
        return {name: options[self.codes[name][row]] for name, options in self.options.items()}

    def job_of(self, row: int) -> Job:
        """The job under the layout of a row."""
        return replace(self.job, strategy=self.strategy(row))

    def take(self, rows: NDArray[Any]) -> "Layouts":
        """Some of the layouts, in order."""
        return replace(self, codes={name: codes[rows] for name, codes in self.codes.items()})

    def pipelines(self) -> Iterator[slice]:
        """Runs of layouts of one pipeline."""
        key = self._key(PIPELINE)
        ends = [*np.flatnonzero(np.diff(key)) + 1, len(key)]
        start = 0
        for end in map(int, ends):
            yield from (slice(at, min(at + ROWS, end)) for at in range(start, end, ROWS))
            start = end

    def alike(self, names: tuple[str, ...]) -> tuple[Codes, Codes]:
        """(first layout of each kind, kind of each layout): two of a kind have the same values of these fields."""
        key = self._key(names)
        size = int(key.max()) + 1
        there = np.zeros(size, np.int64)
        there[key] = 1
        kind = (np.cumsum(there) - 1).astype(np.int32)[key]
        first = np.empty(int(there.sum()), np.int64)
        first[kind[::-1]] = np.arange(len(key))[::-1]
        return first, kind

    def _key(self, names: tuple[str, ...]) -> Codes:
        key = np.zeros(len(self), np.int64)
        for name in names:
            # what no layout differs in has no column
            if name in self.codes:
                key = key * len(self.options[name]) + self.codes[name]
        return key


class Answers(Generic[S]):
    """Terms of many layouts, each computed once for every kind of layout it tells apart."""

    def __init__(self, layouts: Layouts, subject_of: Callable[[Job], S]) -> None:
        self.layouts = layouts
        self.subject_of = subject_of
        self._alike: dict[tuple[str, ...], tuple[Codes, Codes]] = {}
        self._tables: dict[tuple[Any, ...], Any] = {}
        self._subjects: dict[int, S] = {}

    def about(self, rows: slice) -> "View[S]":
        """What answers a formula about a run of layouts."""
        return View(self, rows)

    def subject(self, row: int) -> S:
        """What terms are asked about for one layout."""
        if row not in self._subjects:
            self._subjects[row] = self.subject_of(self.layouts.job_of(row))
        return self._subjects[row]

    def rows_of(self, rows: slice, term: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The term's values for a run of layouts."""
        names: tuple[str, ...] = term.reads  # type: ignore[attr-defined]
        if names not in self._alike:
            self._alike[names] = self.layouts.alike(names)
        first, kind = self._alike[names]
        key = (term, *args)
        if key not in self._tables:
            self._tables[key] = _columns([term(self.subject(int(row)), *args) for row in first])
        return _each(self._tables[key], lambda column: column[kind[rows]])


class View(Terms[S]):
    """Answers formulas about a run of layouts of one pipeline with arrays of one value a layout."""

    def __init__(self, answers: Answers[S], rows: slice) -> None:
        self.subject = answers.subject(rows.start)
        self._answers, self._rows = answers, rows
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, term: Callable[..., Any], *args: Any) -> Any:
        key = (term, *args)
        if key not in self._known:
            self._known[key] = self._answers.rows_of(self._rows, term, args)
        return self._known[key]


def _columns(values: list[Any]) -> Any:
    """A list of numbers as an array; of dataclasses as one dataclass of arrays."""
    if not is_dataclass(values[0]):
        return np.array(values)
    kind: Any = type(values[0])
    return kind(**{name: _columns([getattr(value, name) for value in values]) for name in vars(values[0])})


def _each(columns: Any, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Any:
    if not is_dataclass(columns):
        return change(columns)
    kind: Any = type(columns)
    return kind(**{name: _each(column, change) for name, column in vars(columns).items()})
