"""Seconds that the collectives of a step take on the wire, nothing hidden yet: terms of the step's time.

What is sent is `volume`'s, asked for one block and one micro-batch at a time; what it takes is the cluster's.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from turnout.plan.collectives import Collective, collective
from turnout.plan.data_volume import dense_mesh, expert_data_mesh, reductions
from turnout.plan.engine import Engine
from turnout.plan.expert_volume import exchange, expert_mesh, expert_tensor_volume, expert_weights_volume
from turnout.plan.job import Job
from turnout.plan.parameters import Parameters
from turnout.plan.pipeline import Stage
from turnout.plan.step import Step
from turnout.plan.terms import Numbers, larger, reads
from turnout.plan.volume import context_volume, embedding_volume, pipeline_volume, tensor_volume
from turnout.topology import Cluster, Link, Mesh

# host and device seconds before a collective's first byte: SimuMax 1.2, measured on 8 B200 (22 to 26 us)
# https://github.com/MooreThreads/SimuMax
COLLECTIVE_LAUNCH_S = 22e-6
# axes whose gathers and scatters are rings in NCCL, and whose sums are trees where those take fewer hops
RINGS = ("tp", "etp", "dp", "edp")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job on a cluster: what terms of time are asked about."""

    job: Job
    cluster: Cluster
    parameters: Parameters

    @cached_property
    def engine(self) -> Engine:
        return Engine(device=self.cluster.device, parameters=self.parameters)

    def step(self, stage: Stage, tokens: float) -> Step:
        """One micro-batch of so many tokens a rank through `stage`, for `volume`."""
        return Step(
            shape=self.job.shape,
            strategy=self.job.strategy,
            devices_per_node=self.cluster.devices_per_node,
            tokens=tokens,
            micro_batches=1,
            node_limit=node_limit(self.job, self.cluster),
            reshards=self.job.framework.reshards,
            zero_sums=self.job.framework.zero_sums,
            stage=stage,
        )

    def block(self, block: int) -> Step:
        """One micro-batch through one block."""
        return self.step(_stage(layers=(block,)), self.job.rank_tokens)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Collectives of a kind on the two tiers of a network; each is a float, or an array of layouts."""

    launch_s: Numbers = 0.0
    intra_latency_s: Numbers = 0.0
    intra_bytes_s: Numbers = 0.0
    inter_latency_s: Numbers = 0.0
    inter_bytes_s: Numbers = 0.0

    def seconds(self, size: Numbers = 1.0, chunks: Numbers = 1) -> Numbers:
        """Seconds of `size` times the bytes in `chunks` times the messages: both tiers send at once."""
        intra = chunks * self.intra_latency_s + size * self.intra_bytes_s
        inter = chunks * self.inter_latency_s + size * self.inter_bytes_s
        return chunks * self.launch_s + larger(intra, inter)


def wire_of(part: Collective, cluster: Cluster) -> Wire:
    """All calls of a collective on a cluster's links; nothing if it sends nothing."""
    if part.total_bytes <= 0:
        return Wire()
    intra, inter = part.intra_link(cluster), cluster.inter_over(part.mesh.nodes)
    # XLA sums along a torus first and between pods then
    flat = part.axis in RINGS and not cluster.torus
    intra_latency_s, inter_latency_s = (_flat_s if flat else _sent_s)(part, intra, inter)
    return Wire(
        launch_s=part.calls * COLLECTIVE_LAUNCH_S,
        intra_latency_s=intra_latency_s,
        intra_bytes_s=intra.time_s(part.intra_bytes, 0.0),
        inter_latency_s=inter_latency_s,
        inter_bytes_s=inter.time_s(part.inter_bytes, 0.0),
    )


def _sent_s(part: Collective, intra: Link, inter: Link) -> tuple[float, float]:
    """Seconds of the messages of all calls on either tier, one after the other."""
    return intra.time_s(0.0, part.intra_messages), inter.time_s(0.0, part.inter_messages)


def _flat_s(part: Collective, intra: Link, inter: Link) -> tuple[float, float]:
    """Seconds of messages that wait for each other, in rings and trees over all ranks whatever node they are on."""
    mesh, calls = part.mesh, part.calls
    if mesh.nodes == 1:
        fewest = 2 * math.ceil(math.log2(mesh.size)) * calls if _is_sum(part) else part.messages
        return intra.time_s(0.0, min(part.messages, fewest)), 0.0
    # a ring moves on in step, and in every step one hop leaves the node
    ring = intra.time_s(0.0, part.messages), inter.time_s(0.0, part.messages)
    if not _is_sum(part):
        return ring
    # a tree of nodes, each a chain, needs fewer hops for the same bytes: Sanders et al. 2009 (two trees), NCCL 2.4
    tree = intra.time_s(0.0, 2 * (mesh.local - 1) * calls)
    tree += inter.time_s(0.0, 2 * math.ceil(math.log2(mesh.nodes)) * calls)
    return min(ring, (tree, tree), key=max)


def _is_sum(part: Collective) -> bool:
    """A ring sum passes everybody twice, a gather or a scatter once."""
    return part.messages > 1.5 * (part.mesh.size - 1) * part.calls


def collective_s(part: Collective, cluster: Cluster) -> float:
    """Seconds of all calls of a collective: what leaves the node and what stays travel at once."""
    return wire_of(part, cluster).seconds()


def node_limit(job: Job, cluster: Cluster) -> int:
    """Nodes a token may reach, where the model's router is limited to groups of experts; 0: all."""
    shape, nodes = job.shape, expert_mesh(job.strategy, cluster.devices_per_node).nodes
    if not shape.expert_groups or nodes == 1:
        return 0
    return math.ceil(shape.top_groups * nodes / shape.expert_groups)


# --- one block, one micro-batch ---


@reads("tp", "sequence_parallel", "tokens", "recompute", "etp", "alltoall")
def tensor_s(run: Run, block: int) -> float:
    """Sums and gathers of one block over tensor-parallel ranks."""
    return _sum_s(tensor_volume(run.block(block)), run.cluster)


@reads("tp", "cp", "tokens", "recompute")
def context_s(run: Run, block: int) -> float:
    """Keys and values of one block round the context-parallel ranks."""
    return _sum_s(context_volume(run.block(block)), run.cluster)


@reads("tp", "sequence_parallel", "ep", "etp", "folded", "alltoall", "dispatch_precision", "adaptive_r")
def exchange_wire(run: Run, block: int, again: bool) -> Wire:
    """The all-to-all of one block for one token a rank; `again`: what full recomputation sends once more."""
    passed, repeated = exchange(run.step(_stage(layers=(block,)), 1.0), run.job.shape.experts_of(block))
    return wire_of(repeated if again else passed, run.cluster)


@reads("tp", "sequence_parallel", "tokens", "recompute", "etp", "adaptive_r")
def expert_tensor_s(run: Run, block: int) -> float:
    """Rows of one block among the ranks that share an expert."""
    return _sum_s(expert_tensor_volume(run.block(block), run.job.shape.experts_of(block)), run.cluster)


@reads("recompute", "ep", "etp", "adaptive_r")
def expert_weights_s(run: Run, block: int) -> float:
    """Weights of one block's experts that are gathered, and the sums of their gradients."""
    return _sum_s(expert_weights_volume(run.block(block), run.job.shape.experts_of(block)), run.cluster)


# --- one micro-batch ---


@reads("tp", "sequence_parallel", "tokens")
def table_s(run: Run) -> float:
    """Sums and gathers at the embedding, or at one output matrix."""
    return _sum_s(embedding_volume(run.step(_stage(embedding=True), run.job.rank_tokens)), run.cluster)


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Between the stages of a pipeline, of one micro-batch."""

    pp_s: Numbers  # sends
    tp_s: Numbers  # gathers of what was sent in shares


@reads("tp", "sequence_parallel", "tokens", "pp", "virtual_stages")
def boundary(run: Run) -> Boundary:
    """Sends of an inner stage, and gathers after them."""
    parts = list(pipeline_volume(run.step(_stage(), run.job.rank_tokens)))
    pp, tp = (_sum_s([part for part in parts if part.axis == axis], run.cluster) for axis in ("pp", "tp"))
    return Boundary(pp_s=pp, tp_s=tp)


# --- one step ---


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
    return _reduced(run, mesh, "edp", 1 / (strategy.ep * strategy.etp), slot)


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


def _sum_s(parts: Iterable[Collective], cluster: Cluster) -> float:
    return sum(collective_s(part, cluster) for part in parts)


def _stage(layers: tuple[int, ...] = (), embedding: bool = False) -> Stage:
    blocks = tuple((layer, 1) for layer in layers)
    return Stage(index=0, layers=layers, embedding=embedding, head=False, blocks=blocks)
