"""Seconds that collectives take on the wire of a cluster, nothing hidden yet."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from turnout.plan.collectives import Collective
from turnout.plan.engine import Engine
from turnout.plan.expert_volume import expert_mesh
from turnout.plan.job import Job
from turnout.plan.parameters import Parameters
from turnout.plan.pipeline import Stage
from turnout.plan.step import Step
from turnout.plan.terms import Numbers, larger
from turnout.topology import Cluster, Link

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
            capacity_factor=self.job.padding,
            node_limit=node_limit(self.job, self.cluster),
            reshards=self.job.framework.reshards,
            zero_sums=self.job.framework.zero_sums,
            stage=stage,
        )

    def block(self, block: int) -> Step:
        """One micro-batch through one block."""
        return self.step(bare_stage(layers=(block,)), self.job.rank_tokens)


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
    intra, inter = part.intra_link(cluster), part.inter_link(cluster)
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


def sum_s(parts: Iterable[Collective], cluster: Cluster) -> float:
    """Seconds of collectives one after another."""
    return sum(collective_s(part, cluster) for part in parts)


def bare_stage(layers: tuple[int, ...] = (), embedding: bool = False) -> Stage:
    """A stage of so many blocks, without the output matrix, and without tables unless told."""
    blocks = tuple((layer, 1) for layer in layers)
    return Stage(index=0, layers=layers, embedding=embedding, head=False, blocks=blocks)
