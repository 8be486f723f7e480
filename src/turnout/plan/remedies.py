"""What would make a job fit its devices: one change of the layout, or two, cheapest in time first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from turnout.errors import ConfigError
from turnout.plan.job import Job
from turnout.plan.memory import beside_bytes, memory
from turnout.plan.query import Query
from turnout.plan.time import step_time
from turnout.strategy import Strategy

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A changed layout and what it needs."""

    changes: Fields  # fields of the layout and their values
    strategy: Strategy  # the whole layout, dp filled in
    peak_bytes: float  # allocated on the device that needs most
    over_bytes: float  # beyond the device; 0 or less: it fits
    step_s: float

    def to_json(self) -> dict[str, Any]:
        """As `plan memory --json` prints it."""
        names = ("changes", "peak_bytes", "over_bytes", "step_s")
        return {name: getattr(self, name) for name in names}


def over_bytes(job: Job, device_bytes: float) -> float:
    """Bytes that a device lacks for the job and what lies beside it; below 0 are left."""
    allocated = memory(job).allocated_bytes
    return allocated + beside_bytes(allocated) - device_bytes


def remedies(query: Query, *, most: int = 5) -> tuple[Remedy, ...]:
    """Up to `most` layouts that fit, the shortest step first; if none does, the one that lacks least.

    One change is tried at a time, then pairs of them.
    Raises: ConfigError if the query itself is not legal.
    """
    singles = [changes for changes in _changes(query.job().strategy) if _job(query, changes) is not None]
    tried = list(_tried(query, singles))
    if not any(over <= 0 for _, _, over in tried):
        tried += _tried(query, _pairs(singles))
    fitting = [(changes, job, over) for changes, job, over in tried if over <= 0]
    if fitting:
        found = sorted((_remedy(query, *each) for each in fitting), key=lambda remedy: remedy.step_s)
        return tuple(found[:most])
    return tuple(_remedy(query, *each) for each in sorted(tried, key=lambda each: each[2])[:1])


def _tried(query: Query, changes: Iterator[Fields] | list[Fields]) -> Iterator[tuple[Fields, Job, float]]:
    for each in changes:
        job = _job(query, each)
        if job is not None:
            yield each, job, over_bytes(job, query.machine.device.memory_bytes)


def _job(query: Query, changes: Fields) -> Job | None:
    """The job of the changed layout; nothing if it is not legal."""
    try:
        return query.with_strategy(replace(query.strategy, dp=0, **changes)).job()
    except ConfigError:
        return None


def _remedy(query: Query, changes: Fields, job: Job, over: float) -> Remedy:
    return Remedy(
        changes=changes,
        strategy=job.strategy,
        peak_bytes=memory(job).allocated_bytes,
        over_bytes=over,
        step_s=step_time(job, query.machine).step_s,
    )


def _changes(now: Strategy) -> Iterator[Fields]:
    """Single changes that can lower memory, legal or not."""
    kinds = ("none", "light", "selective", "full")
    # what is kept in a precision of its own is so under light recomputation alone
    kept = {"kept_precision": ""} if now.kept_precision else {}
    yield from ({"recompute": kind} | kept for kind in kinds[kinds.index(now.recompute) + 1 :])
    yield from ({"zero": stage} for stage in range(now.zero + 1, 4))
    if now.tp > 1 and not now.sequence_parallel:
        yield {"sequence_parallel": True}
    if now.micro_batch > 1:
        yield {"micro_batch": 1}
    # experts cut by tp stay so
    yield {"tp": 2 * now.tp} | ({"etp": 2 * now.tp} if now.etp == now.tp > 1 else {})
    yield from ({name: 2 * getattr(now, name)} for name in ("pp", "cp", "ep"))


def _pairs(singles: list[Fields]) -> Iterator[Fields]:
    return (a | b for a, b in combinations(singles, 2) if not a.keys() & b.keys())
