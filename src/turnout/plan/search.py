"""The search for a layout: all legal ones evaluated, those that fit ranked, and the front of memory, time and money."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from turnout.errors import ConfigError
from turnout.plan.memory import GIB
from turnout.plan.parameters import Parameters
from turnout.plan.query import Query
from turnout.plan.rank import RANKS, TIE, Rank
from turnout.plan.space import SEARCHED, Space
from turnout.plan.time import step_time
from turnout.plan.waterfall import mfu
from turnout.strategy import Strategy

if TYPE_CHECKING:
    from turnout.plan.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout that fits, and what a step under it takes."""

    strategy: Strategy  # dp filled in
    devices: int
    step_s: float
    mfu: float  # share of the bf16 peak; all pairs of a sequence counted, recomputation not
    memory_gib: float  # allocated on the device that needs most
    usd_per_step: float | None  # rent of all devices; None where the cluster gives no price

    def to_json(self) -> dict[str, Any]:
        """The row of `plan search --json`: `layout` has the searched fields, dp, and what else is not the default."""
        default = Strategy()
        shown = {"dp", *SEARCHED}
        fields = asdict(self.strategy)
        layout = {name: value for name, value in fields.items() if name in shown or value != getattr(default, name)}
        return {"layout": layout} | {name: value for name, value in vars(self).items() if name != "strategy"}


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    best: tuple[Candidate, ...]  # best first; empty if nothing fits
    pareto: tuple[Candidate, ...]  # none is matched in memory, time and dollars by one that beats it; fastest first
    considered: int  # legal layouts, all evaluated
    fitting: int  # of these, how many fit their devices
    least_memory_gib: float  # of the layout that needs least, fit or not
    seconds: float  # the search took
    rank: Rank

    def to_json(self) -> dict[str, Any]:
        """What `plan search --json` prints."""
        rows = {name: [each.to_json() for each in getattr(self, name)] for name in ("best", "pareto")}
        names = ("considered", "fitting", "least_memory_gib", "seconds", "rank")
        return rows | {name: getattr(self, name) for name in names}


def search(
    query: Query,
    *,
    rank: Rank = "time",
    top: int = 10,
    space: Space | None = None,
    nodes: Sequence[int] = (),
    parameters: Parameters | None = None,
) -> SearchResult:
    """The `top` layouts of the query's model, cluster and batch, and the Pareto front of memory, time and dollars.

    Searched is what Space lists; the query's own layout gives the rest (precisions, `cp_kind`, `zero_size`). `nodes`
    tries several sizes of cluster in place of the query's, which is where time and cost part.
    Raises: ConfigError if the query is not legal, or no layout is.
    """
    started = time.perf_counter()
    if rank not in RANKS:
        raise ConfigError(f"rank={rank!r} must be one of: {', '.join(RANKS)}")
    if top < 1:
        raise ConfigError(f"top={top} must be at least 1; nearest legal: 1")
    from turnout.plan.evaluation import best_rows, evaluate, front_rows

    sizes = [replace(query, nodes=each, devices=0) for each in nodes] or [query]
    evaluated = [(each, evaluate(each, space, parameters)) for each in sizes]
    ranked = [_candidate(*each, row, parameters) for each in evaluated for row in best_rows(each[1], rank, top)]
    fronts = [_candidate(*each, row, parameters) for each in evaluated for row in front_rows(each[1])]
    return SearchResult(
        best=tuple(sorted(ranked, key=lambda candidate: _keys(candidate, rank))[:top]),
        pareto=undominated(fronts),
        considered=sum(found.considered for _, found in evaluated),
        fitting=sum(len(found.layouts) for _, found in evaluated),
        least_memory_gib=min(found.least_bytes for _, found in evaluated) / GIB,
        seconds=time.perf_counter() - started,
        rank=rank,
    )


def undominated(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other matches in memory, step and device time while beating it in one; fastest first."""
    ordered = sorted(candidates, key=lambda candidate: _keys(candidate, "time"))
    kept: list[Candidate] = []
    for each in ordered:
        if not any(_covers(other, each) for other in kept):
            kept.append(each)
    return tuple(kept)


def _covers(one: Candidate, other: Candidate) -> bool:
    pairs = zip(_goods(one), _goods(other), strict=True)
    return all(a <= b * (1 + TIE) for a, b in pairs)


def _goods(candidate: Candidate) -> tuple[float, float, float]:
    """What should be small. Dollars go as device time, which is known without a price."""
    return candidate.memory_gib, candidate.step_s, candidate.step_s * candidate.devices


def _keys(candidate: Candidate, rank: Rank) -> tuple[float, ...]:
    memory, step, device_s = _goods(candidate)
    return {"time": (step, memory), "cost": (device_s, step, memory), "memory": (memory, step)}[rank]


def _candidate(query: Query, found: "Evaluation", row: int, parameters: Parameters | None) -> Candidate:
    job, machine = found.layouts.job_of(row), query.machine
    step = step_time(job, machine, parameters)
    price = machine.usd_per_device_hour
    return Candidate(
        strategy=job.strategy,
        devices=job.world,
        step_s=step.step_s,
        mfu=mfu(step, job, machine),
        memory_gib=float(found.allocated_bytes[row]) / GIB,
        usd_per_step=step.step_s * job.world * price / 3600 if price else None,
    )
