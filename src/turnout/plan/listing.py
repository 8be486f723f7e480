"""The legal layouts of a job, listed in columns."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from turnout.plan.columns import Codes, Layouts
from turnout.plan.space import Fields, Legal

# what the exchange's fields are legal by, and all that it depends on
EXCHANGE_OF = ("tp", "sequence_parallel", "ep", "etp", "folded")


def list_layouts(legal: Legal) -> Layouts:
    """Every legal layout but for its exchange (program, overlap, precision of rows), which changes no memory."""
    columns = _Columns()
    recomputations = list(legal.recomputations())
    for pipeline in legal.pipelines():
        for grid in legal.grids(pipeline["pp"]):
            dp = legal.job.world // (pipeline["pp"] * grid["tp"] * grid["cp"])
            columns.add(
                pipeline | grid,
                list(legal.experts(pipeline["pp"], grid)),
                list(legal.micro_batches(dp, pipeline)),
                list(legal.shardings(dp, grid)),
                recomputations,
            )
    return _with_derived(columns.layouts(legal))


def exchange_choices(layouts: Layouts, legal: Legal) -> tuple[list[list[Fields]], Codes]:
    """(the exchanges of each kind of layout, the kind of each layout)."""
    first, kind = layouts.alike(EXCHANGE_OF)
    return [list(legal.exchanges(layouts.fields(int(row)))) for row in first], kind


def with_exchanges(layouts: Layouts, choices: list[list[Fields]], kind: Codes) -> Layouts:
    """Each layout with each of its exchanges."""
    numbers = np.array([len(each) for each in choices])
    before = np.cumsum(numbers) - numbers
    rows = np.repeat(np.arange(len(layouts)), numbers[kind])
    # the place of each row among those of its layout
    place = np.arange(len(rows)) - np.repeat(np.cumsum(numbers[kind]) - numbers[kind], numbers[kind])
    which = before[kind[rows]] + place
    columns = _Columns()
    columns.add({}, [choice for each in choices for choice in each])
    listed = columns.layouts_of(layouts.job)
    spread = layouts.take(rows)
    codes = {name: column[which] for name, column in listed.codes.items()}
    return Layouts(job=layouts.job, options={**spread.options, **listed.options}, codes={**spread.codes, **codes})


def _with_derived(layouts: Layouts) -> Layouts:
    """With what terms read beside fields: tokens of a micro-batch on a rank, micro-batches of a step."""
    job = layouts.job

    def micro_batches(size: int, tp: int, cp: int, pp: int) -> int:
        return max(1, -(-job.global_batch // (job.world // (tp * cp * pp) * size)))

    layouts = _derived(layouts, "tokens", ("micro_batch", "cp"), lambda size, cp: size * job.seq_len / cp)
    return _derived(layouts, "micro_batches", ("micro_batch", "tp", "cp", "pp"), micro_batches)


def _derived(layouts: Layouts, name: str, reads: tuple[str, ...], value: Callable[..., float]) -> Layouts:
    first, kind = layouts.alike(reads)
    rows = [layouts.fields(int(row)) for row in first]
    values = [value(*(row[each] for each in reads)) for row in rows]
    options = sorted(set(values))
    codes = np.array([options.index(each) for each in values])[kind]
    return Layouts(
        job=layouts.job, options={**layouts.options, name: options}, codes={**layouts.codes, name: codes}
    )  # fmt: skip


class _Columns:
    """Layouts being listed, column by column."""

    def __init__(self) -> None:
        self._options: dict[str, dict[Any, int]] = {}
        self._parts: dict[str, list[Codes]] = {}

    def add(self, fixed: Fields, *choices: Sequence[Fields]) -> None:
        """All combinations of the choices, each with the fixed fields."""
        lengths = [len(choice) for choice in choices]
        number = prod(lengths)
        if not number:
            return
        for name, value in fixed.items():
            self._parts.setdefault(name, []).append(np.full(number, self._code(name, value), np.int16))
        for choice, at in zip(choices, np.indices(lengths).reshape(len(lengths), number), strict=True):
            for name in choice[0]:
                codes = np.array([self._code(name, each[name]) for each in choice], np.int16)
                self._parts.setdefault(name, []).append(codes[at])

    def layouts(self, legal: Legal) -> Layouts:
        """What was added. Raises: ConfigError if nothing was."""
        if not self._parts:
            raise legal.refusal()
        return self.layouts_of(legal.job)

    def layouts_of(self, job: Any) -> Layouts:
        """What was added, as layouts of a job."""
        codes = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        return Layouts(job=job, options={name: list(values) for name, values in self._options.items()}, codes=codes)

    def _code(self, name: str, value: Any) -> int:
        codes = self._options.setdefault(name, {})
        return codes.setdefault(value, len(codes))
