"""A recorded run's routing in place of uniform routing: loads of its experts, skew of ranks, bytes of each layer.

Expected rows per assignment are the loads' own; rows merged per rank or node are estimated (turnout.alltoall.expected).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnout.alltoall import PROGRAMS, LoadedRouting, pairs_of, round_trip
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.plan.collectives import Collective, chunked
from turnout.plan.expert_volume import exchange, expert_mesh, row_size
from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.step import Step

if TYPE_CHECKING:
    # numpy takes longer to import than a plan without a trace to make
    from turnout.trace import Trace

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class LayerLoads:
    """Assignments that reached each expert of one layer, and of each recorded step."""

    name: str  # in the trace
    loads: tuple[float, ...]  # over all steps; dropped ones are not among these
    by_step: tuple[tuple[float, ...], ...]
    dropped_share: float  # of all assignments, for want of room

    def skew(self, ep: int) -> float:
        """Assignments of the busiest of `ep` ranks over the mean, over the whole run."""
        return skew_of(self.loads, ep)

    def step_skews(self, ep: int) -> tuple[float, ...]:
        """The same for each step: what its slowest rank takes longer."""
        return tuple(skew_of(loads, ep) for loads in self.by_step)


@dataclass(frozen=True, kw_only=True)
class LayerTraffic:
    """The exchange of one layer in a step of one rank, as recorded and as uniform routing has it."""

    layer: int  # block of the model
    name: str  # in the trace
    skew: float
    step_skew: float  # mean over steps
    recorded: Collective
    uniform: Collective
    busiest_bytes: float  # what one rank receives on the way there and sends on the way back, forwarded rows included

    def to_json(self) -> dict[str, Any]:
        """The row of `plan volume --trace --json`."""
        names = ("layer", "name", "skew", "step_skew", "busiest_bytes")
        tiers = ("intra_bytes", "inter_bytes")
        row = {name: getattr(self, name) for name in names} | {name: getattr(self.recorded, name) for name in tiers}
        return row | {f"uniform_{name}": getattr(self.uniform, name) for name in tiers}


def recorded_loads(run: Path, shape: ModelShape, layer: str = ALL) -> dict[int, LayerLoads]:
    """Sparse block of the model -> what the run's trace says of it; one layer of the trace may stand for all.

    Raises: ConfigError if the run has no trace, or its layers or experts are not the model's.
    """
    from turnout.trace import TRACE_NAME, read_trace

    if not shape.num_experts:
        raise ConfigError(f"model {shape.name!r} has no experts; a trace tells of a model that has")
    trace = read_trace(run)
    if not trace.layers or not len(trace.steps):
        raise ConfigError(f"{run} has no {TRACE_NAME}, or no step in it; give the folder of a run with experts")
    found = {block: _loads_of(trace, index) for block, index in _pairs(trace, shape, layer)}
    for block, each in found.items():
        if len(each.loads) != shape.experts_of(block):
            raise ConfigError(
                f"layer {each.name!r} of {run} has {len(each.loads)} experts; block {block} of the model has "
                f"{shape.experts_of(block)}; give the model that was trained"
            )
        if not sum(each.loads):
            raise ConfigError(f"layer {each.name!r} of {run} routed nothing; give a run that trained")
    return found


def _pairs(trace: "Trace", shape: ModelShape, layer: str) -> list[tuple[int, int]]:
    """(sparse block of the model, layer of the trace that tells of it)."""
    blocks, layers = shape.sparse_layers, len(trace.layers)
    if layer == ALL:
        if len(blocks) != layers:
            raise ConfigError(
                f"--layer all: the trace has {layers} layers, the model {len(blocks)} with experts; nearest legal: one "
                f"of 0..{layers - 1}, which stands for all"
            )
        return list(zip(blocks, range(layers), strict=True))
    if not layer.isdecimal() or int(layer) >= layers:
        near = min(int(layer), layers - 1) if layer.isdecimal() else ALL
        raise ConfigError(f"--layer {layer} must be all, or in 0..{layers - 1}; nearest legal: {near}")
    return [(block, int(layer)) for block in blocks]


def _loads_of(trace: "Trace", index: int) -> LayerLoads:
    assigned, dropped = trace.counts[index], trace.dropped[index]
    kept = assigned.astype(float) - dropped
    # a step without any assignment (an idle rank's) tells nothing of skew
    rows = tuple(tuple(map(float, row)) for row in kept if row.sum() > 0)
    total = float(assigned.sum())
    return LayerLoads(
        name=trace.layers[index], loads=tuple(map(float, kept.sum(axis=0))), by_step=rows,
        dropped_share=float(dropped.sum()) / total if total else 0.0,
    )  # fmt: skip


# --- skew ---


def skew_of(loads: tuple[float, ...], ep: int) -> float:
    """Assignments of the busiest of `ep` ranks of neighbouring experts over the mean."""
    by_rank = [sum(loads[start:end]) for start, end in pairwise(Placement.even(len(loads), ep).bounds)]
    return max(by_rank) * ep / sum(by_rank)


def mean_skew(found: dict[int, LayerLoads], ep: int) -> float:
    """Over layers and steps: every layer of every step waits for its slowest rank. What time is asked with."""
    skews = [skew for each in found.values() for skew in each.step_skews(ep)]
    return sum(skews) / len(skews)


def worst_skew(found: dict[int, LayerLoads], ep: int) -> float:
    """Of any layer in any step: what memory must hold."""
    return max(skew for each in found.values() for skew in each.step_skews(ep))


def skewed_jobs(job: Job, found: dict[int, LayerLoads]) -> tuple[Job, Job]:
    """The job as time and as memory should be asked about it: with the mean skew, and with the worst."""
    ep = job.strategy.ep
    return replace(job, skew=mean_skew(found, ep)), replace(job, skew=worst_skew(found, ep))


# --- bytes ---


def layer_traffic(step: Step, found: dict[int, LayerLoads]) -> Iterator[LayerTraffic]:
    """The exchange of every recorded layer, forward and backward; of the mean stage, as `volume` has it."""
    for block, each in found.items():
        skews = each.step_skews(step.strategy.ep)
        recorded = _exchanges(_recorded(step, each), block)[0]
        yield LayerTraffic(
            layer=block, name=each.name, skew=each.skew(step.strategy.ep), step_skew=sum(skews) / len(skews),
            recorded=recorded, uniform=_exchanges(step, block)[0],
            busiest_bytes=recorded.total_bytes * _busiest_over_mean(step, each.loads),
        )  # fmt: skip


def with_recorded(step: Step, parts: tuple[Collective, ...], found: dict[int, LayerLoads]) -> tuple[Collective, ...]:
    """The collectives of a step with the recorded exchange in place of the uniform one."""
    layers = [_exchanges(_recorded(step, each), block) for block, each in found.items()]
    sums = {alike[0].name: _sum(alike) for alike in zip(*layers, strict=True)}
    return tuple(sums.get(part.name, part) for part in parts)


def _recorded(step: Step, each: LayerLoads) -> Step:
    # the trace has what the router's limit left
    return replace(step, expert_loads=each.loads, node_limit=0)


def _exchanges(step: Step, block: int) -> tuple[Collective, Collective]:
    """What `expert_volume` has of one block, of the mean stage: forward and backward, and of recomputation."""
    shape, strategy = step.shape, step.strategy
    alike = 1 + (shape.mtp_layers if block == shape.sparse_layers[-1] else 0)
    passed, again = exchange(step, shape.experts_of(block), alike * step.micro_batches / strategy.pp)
    return chunked(passed, strategy.overlap), chunked(again, strategy.overlap)


def _sum(parts: tuple[Collective, ...]) -> Collective:
    names = ("calls", *(f"{tier}_{what}" for tier in ("intra", "inter", "cross") for what in ("bytes", "messages")))
    return replace(parts[0], **{name: sum(getattr(part, name) for part in parts) for name in names})


def _busiest_over_mean(step: Step, loads: tuple[float, ...]) -> float:
    """Bytes that the busiest rank receives in dispatch, and sends back in combine, over the mean."""
    strategy = step.strategy
    mesh = expert_mesh(strategy, step.devices_per_node)
    if mesh.size == 1:
        return 1.0
    routing = LoadedRouting(mesh=mesh, num_tokens=1.0, top_k=step.shape.top_k, loads=loads)
    size = row_size(strategy, step.shape.latent_dim or step.shape.dim)
    received: dict[int, float] = defaultdict(float)
    there = tuple(move for move in round_trip(PROGRAMS[strategy.alltoall], mesh) if not move.back)
    for (_, receiver), (moved_bytes, _) in pairs_of(there, routing, size).items():
        received[receiver] += moved_bytes
    return max(received.values()) * mesh.size / sum(received.values())
