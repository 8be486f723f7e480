"""One thing changed at a time: a faster network, another all-to-all, another routing; each as seconds of a step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from turnout.errors import ConfigError
from turnout.plan.expert_volume import expert_mesh
from turnout.plan.job import Job
from turnout.plan.query import Query
from turnout.plan.time import node_limit, step_time
from turnout.strategy import Strategy
from turnout.topology import Cluster

RACK = 72  # devices of an NVL72's NVLink domain: NVIDIA GB200 NVL72 data sheet
NODE_LIMIT = 4  # nodes a token may reach: DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2
CHUNKS = 2  # of an exchange that overlaps computation: Hwang et al. 2022, arXiv:2206.03382, section 4.3


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A change and the step it leads to."""

    change: str
    step_s: float | None  # none where the change does not apply
    saved: float | None  # share of the step; below 0 it takes longer
    why_not: str = ""  # it does not apply

    def to_json(self) -> dict[str, Any]:
        """As `plan time --json` prints it."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class _Change:
    name: str
    strategy: dict[str, Any] | None = None
    cluster: Cluster | None = None
    limit: int = 0  # nodes a token may reach; 0: as the model has it, -1: all
    why_not: str = ""


def what_ifs(query: Query) -> tuple[WhatIf, ...]:
    """Every change that `plan time --what-if` shows, with its step; those that do not apply say why.

    Raises: ConfigError if the query itself is not legal.
    """
    base_s = step_time(query.job(), query.machine).step_s
    return tuple(_answered(change, query, base_s) for change in _changes(query))


def _answered(change: _Change, query: Query, base_s: float) -> WhatIf:
    if change.why_not:
        return WhatIf(change=change.name, step_s=None, saved=None, why_not=change.why_not)
    try:
        strategy = replace(query.strategy, **(change.strategy or {}))
        job = _limited(query.with_strategy(strategy).job(), change.limit, query.machine)
        seconds = step_time(job, change.cluster or query.machine).step_s
    except ConfigError as error:
        return WhatIf(change=change.name, step_s=None, saved=None, why_not=str(error))
    return WhatIf(change=change.name, step_s=seconds, saved=1 - seconds / base_s)


def _limited(job: Job, limit: int, cluster: Cluster) -> Job:
    """The job with routing limited to so many of the nodes its experts are on."""
    if limit == 0:
        return job
    groups = (_expert_nodes(job.strategy, cluster), limit) if limit > 0 else (0, 0)
    return replace(job, shape=replace(job.shape, expert_groups=groups[0], top_groups=groups[1]))


def _expert_nodes(strategy: Strategy, cluster: Cluster) -> int:
    return expert_mesh(strategy, cluster.devices_per_node).nodes


# --- the changes ---


def _changes(query: Query) -> Iterator[_Change]:
    machine = query.machine
    inter = replace(machine.inter, bytes_per_s=2 * machine.inter.bytes_per_s)
    yield _Change(name="network cards twice as fast", cluster=replace(machine, inter=inter))
    if machine.devices_per_node >= RACK or machine.torus:
        yield _Change(name="NVL72: a scale-up domain of 72", why_not=f"a node has {machine.devices_per_node} devices")
    else:
        yield _Change(name="NVL72: a scale-up domain of 72", cluster=replace(machine, devices_per_node=RACK))
    yield from _expert_changes(query)
    yield from _tensor_changes(query.strategy)


def _expert_changes(query: Query) -> Iterator[_Change]:
    strategy = query.strategy
    if not query.shape.num_experts or strategy.ep == 1:
        why = "the model has no experts" if not query.shape.num_experts else "with ep=1 no row leaves its rank"
        names = ("fp8 dispatch", "copies for a node merged", "routing limited to few nodes", "2DH", "overlap")
        yield from (_Change(name=name, why_not=why) for name in names)
        return
    already = f"the layout has dispatch_precision={strategy.dispatch_precision}" if strategy.dispatch_precision else ""
    yield _Change(name="fp8 dispatch", strategy={"dispatch_precision": "fp8"}, why_not=already)
    yield _merging(strategy)
    yield _limiting(query)
    if strategy.alltoall != "hierarchical":
        yield _Change(name="two-level all-to-all (2DH)", strategy={"alltoall": "hierarchical"})
    if strategy.overlap == 1:
        yield _Change(name=f"exchange and experts overlap in {CHUNKS} chunks", strategy={"overlap": CHUNKS})
    else:
        yield _Change(name="exchange and experts do not overlap", strategy={"overlap": 1})


def _merging(strategy: Strategy) -> _Change:
    if strategy.alltoall == "node_dedup":
        return _Change(name="each copy sent by itself (flat)", strategy={"alltoall": "flat"})
    return _Change(name="copies for a node merged (node_dedup)", strategy={"alltoall": "node_dedup"})


def _limiting(query: Query) -> _Change:
    nodes, today = _expert_nodes(query.strategy, query.machine), node_limit(query.job(), query.machine)
    if today:
        return _Change(name=f"routing not limited to {today} of {nodes} nodes", limit=-1)
    name = f"routing limited to {NODE_LIMIT} nodes, their copies merged"
    if nodes <= NODE_LIMIT:
        return _Change(name=name, why_not=f"the experts are on {nodes} node{'s' * (nodes > 1)}")
    return _Change(name=name, strategy={"alltoall": "node_dedup"}, limit=NODE_LIMIT)


def _tensor_changes(strategy: Strategy) -> Iterator[_Change]:
    if strategy.tp > 1 and not strategy.tokens_sharded and strategy.ep > 1:
        yield _Change(name="tokens shared over tensor ranks", strategy={"shard_tokens": True})
    if strategy.tp > 1 and not strategy.sequence_parallel:
        yield _Change(name="sequence parallel", strategy={"sequence_parallel": True})
