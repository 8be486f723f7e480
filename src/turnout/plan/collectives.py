"""Collectives of a training step: who takes part, and what one rank sends inside its node and beyond.

Closed forms as nccl-tests counts them (doc/PERFORMANCE.md): an all-reduce of S bytes over n ranks sends 2 (n-1)/n S a
rank, an all-gather or reduce-scatter (n-1)/n S. A ring visits node by node, so of g ranks on a node one sends out.
"""

from dataclasses import dataclass, replace
from typing import Any

from turnout.alltoall import Traffic
from turnout.topology import Cluster, Link, Mesh


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All calls of one kind in a step; bytes and messages are what one rank sends, on average over ranks."""

    name: str
    axis: str  # whose communication it is: tp, cp, pp, ep, etp, dp, edp
    mesh: Mesh  # the ranks that take part, on nodes
    calls: float  # calls in a step
    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    intra_messages: float = 0.0
    inter_messages: float = 0.0
    cross_bytes: float = 0.0  # of inter_bytes, to another place of another node
    cross_messages: float = 0.0

    @property
    def messages(self) -> float:
        return self.intra_messages + self.inter_messages

    @property
    def total_bytes(self) -> float:
        return self.intra_bytes + self.inter_bytes

    @property
    def exchanges(self) -> bool:
        """Whether each rank sends to every other, in place of on to the next."""
        return self.axis == "ep" or self.name in ("cp all-to-all", "expert weights")

    def intra_link(self, cluster: Cluster) -> Link:
        """The link inside the node as this collective finds it."""
        pieces = self.axis == "ep" or self.name == "cp all-to-all"
        return cluster.alltoall_intra(self.mesh.local) if pieces else cluster.intra

    def inter_link(self, cluster: Cluster) -> Link:
        """The link between nodes as this collective finds it."""
        return cluster.inter_over(self.mesh.nodes, self.cross_bytes / self.inter_bytes if self.inter_bytes else 0.0)

    def tiers_s(self, cluster: Cluster) -> tuple[float, float]:
        """Seconds of a step on the link inside the node and on the one between nodes, each as if alone."""
        intra, inter = self.intra_link(cluster), self.inter_link(cluster)
        return intra.time_s(self.intra_bytes, self.intra_messages), inter.time_s(self.inter_bytes, self.inter_messages)

    def to_json(self) -> dict[str, Any]:
        """The row of `plan volume --json`, its seconds left out."""
        names = ("name", "axis", "calls", "intra_bytes", "inter_bytes", "messages")
        return {name: getattr(self, name) for name in names}


def group(size: int, stride: int, devices_per_node: int) -> Mesh:
    """The ranks 0, stride, 2 stride ... of a job that fills nodes rank by rank, on their nodes.

    Groups are taken to start at a node's first device, as schedulers place them (on 64 of the 72 devices of a rack);
    where ranks still fall unevenly, the fewest that share a node stand for all.
    """
    local = min(size, max(1, devices_per_node // stride))
    while size % local:
        local -= 1
    return Mesh(nodes=size // local, local=local)


def all_reduce(mesh: Mesh, buffer_bytes: float) -> Traffic:
    """A ring all-reduce of a buffer that every rank holds."""
    return _ring(mesh, 2 * (mesh.size - 1), buffer_bytes / mesh.size)


def all_gather(mesh: Mesh, buffer_bytes: float) -> Traffic:
    """A ring all-gather into a buffer of that size, or a reduce-scatter of one."""
    return _ring(mesh, mesh.size - 1, buffer_bytes / mesh.size)


def all_to_all(mesh: Mesh, buffer_bytes: float) -> Traffic:
    """An even exchange of a buffer that every rank holds, straight to every other rank."""
    piece = buffer_bytes / mesh.size
    near, far, cross = mesh.local - 1, mesh.size - mesh.local, (mesh.nodes - 1) * (mesh.local - 1)
    return Traffic(
        intra_bytes=near * piece, inter_bytes=far * piece, cross_bytes=cross * piece,
        intra_messages=near, inter_messages=far, cross_messages=cross,
    )  # fmt: skip


def ring_pass(mesh: Mesh, buffer_bytes: float) -> Traffic:
    """A buffer of every rank visits all the others, hop by hop."""
    return _ring(mesh, mesh.size - 1, buffer_bytes)


def stage_sends(mesh: Mesh, sends: float, buffer_bytes: float) -> Traffic:
    """An inner rank of a pipeline sends to its neighbours; of the hops of a stage chain only some leave the node."""
    crossing = (mesh.nodes - 1) / (mesh.size - 1) if mesh.size > 1 else 0.0
    return Traffic(
        intra_bytes=sends * buffer_bytes * (1 - crossing),
        inter_bytes=sends * buffer_bytes * crossing,
        intra_messages=sends * (1 - crossing),
        inter_messages=sends * crossing,
    )


def pipeline_sends(pp: int, virtual_stages: int) -> int:
    """Sends of the busiest rank for one micro-batch, activations and gradients together."""
    if pp == 1:
        return 0
    # with two ranks the first only sends activations on and the last only gradients back, but for the wrap-around
    return 2 * virtual_stages - (1 if pp == 2 else 0)


def collective(name: str, axis: str, mesh: Mesh, traffic: Traffic, calls: float = 1.0) -> Collective:
    """`calls` times `traffic`, under a name."""
    return Collective(name=name, axis=axis, mesh=mesh, calls=calls, **vars(traffic.times(calls)))


def chunked(part: Collective, chunks: int) -> Collective:
    """The same bytes in `chunks` times the messages."""
    return replace(
        part,
        calls=part.calls * chunks,
        intra_messages=part.intra_messages * chunks,
        inter_messages=part.inter_messages * chunks,
        cross_messages=part.cross_messages * chunks,
    )


def _ring(mesh: Mesh, steps: int, piece_bytes: float) -> Traffic:
    if mesh.size == 1:
        return Traffic()
    leaving = 1 / mesh.local if mesh.nodes > 1 else 0.0
    return Traffic(
        intra_bytes=steps * piece_bytes * (1 - leaving),
        inter_bytes=steps * piece_bytes * leaving,
        intra_messages=steps * (1 - leaving),
        inter_messages=steps * leaving,
    )
