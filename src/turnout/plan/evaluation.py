"""Every legal layout of a query with its memory and, if it fits, its step: the arrays a search ranks."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from turnout.plan.columns import Answers, Layouts
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.job import Job
from turnout.plan.listing import exchange_choices, list_layouts, with_exchanges
from turnout.plan.memory import allocated_bytes, beside_bytes
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.query import Query
from turnout.plan.rank import TIE, Rank
from turnout.plan.space import SEARCHED, Legal, Space
from turnout.plan.time import slowest_step
from turnout.plan.wire import Run
from turnout.strategy import Strategy
from turnout.topology import Cluster

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Layouts that fit, and what they need."""

    layouts: Layouts
    allocated_bytes: Floats  # on the device that needs most
    step_s: Floats
    considered: int  # legal layouts, those that do not fit included
    least_bytes: float  # of the legal layout that needs least memory, fit or not


def evaluate(query: Query, space: Space | None = None, parameters: Parameters | None = None) -> Evaluation:
    """Memory of every legal layout of the query's job, and the step of those that fit their devices.

    Raises: ConfigError if the query is not legal, or no layout of the space is.
    """
    cluster = query.machine
    legal = Legal(job=base_job(query), devices_per_node=cluster.devices_per_node, space=space or Space())
    listed = list_layouts(legal)
    choices, kind = exchange_choices(listed, legal)
    needed = memory_of(listed)
    numbers = np.array([len(each) for each in choices])
    fits = np.flatnonzero((needed + beside_bytes(needed) <= cluster.device.memory_bytes) & (numbers[kind] > 0))
    layouts = with_exchanges(listed.take(fits), choices, kind[fits])
    return Evaluation(
        layouts=layouts,
        allocated_bytes=np.repeat(needed[fits], numbers[kind[fits]]),
        step_s=step_of_each(layouts, cluster, parameters or fitted()),
        considered=int(numbers[kind].sum()),
        least_bytes=float(needed.min()),
    )


def base_job(query: Query) -> Job:
    """The query's job under the plainest layout: what is not searched is the query's."""
    plain = Strategy()
    asked = query.strategy
    kept = ("cp_kind", "scatter_gather", "shard_tokens", "zero_size", "precision", "dispatch_precision",
            "grad_precision", "kept_precision")  # fmt: skip
    strategy = replace(plain, dp=query.world, **{name: getattr(asked, name) for name in kept})
    return Job(
        shape=query.shape,
        strategy=strategy,
        seq_len=query.seq_len,
        global_batch=query.global_batch,
        framework=FRAMEWORKS[query.framework],
        skew=query.skew,
        capacity_factor=query.capacity_factor,
    )


def memory_of(layouts: Layouts) -> Floats:
    """Bytes allocated on the device that needs most, of each layout."""
    needed = np.empty(len(layouts))
    answers = Answers(layouts, lambda job: job)
    for rows in layouts.pipelines():
        needed[rows] = allocated_bytes(answers.about(rows))
    return needed


def step_of_each(layouts: Layouts, cluster: Cluster, parameters: Parameters) -> Floats:
    """Seconds of a step of each layout."""
    seconds = np.empty(len(layouts))
    answers = Answers(layouts, lambda job: Run(job=job, cluster=cluster, parameters=parameters))
    for rows in layouts.pipelines():
        seconds[rows] = slowest_step(answers.about(rows)).step_s
    return seconds


# --- what stands out ---


def best_rows(found: Evaluation, rank: Rank, top: int) -> list[int]:
    """Rows of the best layouts; of equally fast ones the smaller, of equally small ones the first listed."""
    # on one cluster cost goes as time
    first, second = found.step_s, found.allocated_bytes
    if rank == "memory":
        first, second = second, first
    top = min(top, len(first))
    if not top:
        return []
    rows = np.flatnonzero(first <= np.partition(first, top - 1)[top - 1] * (1 + TIE))
    ordered = np.lexsort((second[rows], np.rint(first[rows] / (TIE * first.min()))))
    return rows[ordered[:top]].tolist()


def front_rows(found: Evaluation) -> list[int]:
    """Rows of layouts that need less memory than all that are as fast; fastest first."""
    front: list[int] = []
    step, needed = found.step_s, found.allocated_bytes
    rows = np.arange(len(step))
    while len(rows):
        fastest = rows[step[rows] <= step[rows].min() * (1 + TIE)]
        front.append(int(fastest[needed[fastest].argmin()]))
        rows = rows[needed[rows] < needed[front[-1]] * (1 - TIE)]
    return front


def nearest_row(found: Evaluation, strategy: Strategy, step_s: float) -> int | None:
    """The row that is faster than `step_s` and differs from `strategy` in the fewest fields; of those the fastest."""
    layouts = found.layouts
    changed = np.zeros(len(layouts), np.int64)
    for name in SEARCHED:
        options, value = list(layouts.options[name]), getattr(strategy, name)
        changed += layouts.codes[name] != (options.index(value) if value in options else -1)
    rows = np.flatnonzero((found.step_s < step_s * (1 - TIE)) & (changed > 0))
    if not len(rows):
        return None
    return int(rows[np.lexsort((found.step_s[rows], changed[rows]))[0]])
