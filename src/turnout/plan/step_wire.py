"""Seconds on the wire of what is sent once a step: gradients, sharded parameters, tied tables; terms of its time."""

from dataclasses import dataclass

from turnout.plan.collectives import collective
from turnout.plan.data_volume import dense_mesh, expert_data_mesh, reductions
from turnout.plan.terms import Numbers, reads
from turnout.plan.wire import Run, Wire, wire_of
from turnout.topology import Mesh


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """One collective over ranks that share parameters, for one parameter of a stage, and how often it runs."""

    wire: Wire
    buckets: Numbers = 0.0  # calls for one parameter of a stage, and no fewer than one in all
    each_pass: Numbers = 0.0  # 1: for every micro-batch
    spread: Numbers = 0.0  # 1: once a step, behind all its micro-batches
    once: Numbers = 0.0  # 1: once a step, at its ends


SLOTS = ("gradient", "parameter", "shard")  # what is reduced or gathered: at most one collective each


@reads("zero", "tp", "pp")
def dense_reduced(run: Run, slot: str) -> Reduced:
    """Of what every token meets."""
    strategy = run.job.strategy
    mesh = dense_mesh(strategy, run.cluster.devices_per_node)
    return _reduced(run, mesh, "dp", 1 / strategy.tp, slot)


@reads("zero", "pp", "tp", "ep", "etp", "folded")
def routed_reduced(run: Run, slot: str) -> Reduced:
    """Of routed experts."""
    strategy = run.job.strategy
    mesh = expert_data_mesh(strategy, run.cluster.devices_per_node)
    return _reduced(run, mesh, "edp", run.job.crowding / (strategy.ep * strategy.etp), slot)


def _reduced(run: Run, mesh: Mesh, axis: str, params: float, slot: str) -> Reduced:
    strategy, framework = run.job.strategy, run.job.framework
    every = reductions(strategy, mesh, params, sums=framework.zero_sums)
    parts = [each for each in every if each.name.startswith(slot)]
    if not parts:
        return Reduced(wire=Wire())
    (part,) = parts
    wire = wire_of(collective(part.name, axis, part.mesh, part.traffic, part.calls), run.cluster)
    late = framework.zero_sums and strategy.zero == 1
    buckets = 0.0 if late else params / framework.bucket_params
    if part.each_pass and framework.reshards:
        return Reduced(wire=wire, buckets=buckets, each_pass=1.0)
    if strategy.zero == 3 and (framework.reshards or strategy.pp == 1):
        return Reduced(wire=wire, buckets=buckets, spread=1.0)
    return Reduced(wire=wire, buckets=buckets, once=1.0)


@reads("tp", "pp")
def tied_s(run: Run) -> float:
    """First and last stage add up their gradients of the one matrix for tokens in and out."""
    job, cluster = run.job, run.cluster
    if job.strategy.pp == 1 or not job.shape.tied_embeddings:
        return 0.0
    size = job.shape.vocab_size * job.shape.dim / job.strategy.tp * job.strategy.activation_bytes
    return (cluster.inter if job.world > cluster.devices_per_node else cluster.intra).time_s(size, 2)
