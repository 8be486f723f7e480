"""Which blocks of rows a rank holds after each verb of a program, and in which order: known before any routing.

A block is what one source has for one destination. How many rows it has the routing says; where it goes it does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from turnout.alltoall.transport import Axis, Packing, Program, Step, steps_of
from turnout.errors import ConfigError
from turnout.topology import Mesh

Block = tuple[int, int]  # (source rank, destination): a rank, or a node where rows are packed per node
Held = dict[int, tuple[Block, ...]]  # rank -> its blocks, in order


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One verb of a program on one rank."""

    step: Step
    peers: tuple[int, ...]  # ranks of its exchange, in order, itself among them; none for another verb
    sent: tuple[tuple[Block, ...], ...]  # blocks for each peer
    received: tuple[tuple[Block, ...], ...]  # blocks from each peer
    held: tuple[Block, ...]  # blocks after the verb, in order


@lru_cache(maxsize=256)
def itinerary(program: Program, mesh: Mesh, rank: int) -> tuple[Leg, ...]:
    """The legs of a program, as `rank` of `mesh` sees them; every rank starts with a block for each.

    Raises: ConfigError if rows that are merged per node would be sent to ranks.
    """
    held: Held = {place: tuple((place, to) for to in range(mesh.size)) for place in range(mesh.size)}
    legs = []
    for step in steps_of(program):
        if step.verb == "exchange":
            leg, held = _exchange(step, mesh, held, rank)
        else:
            held = {place: _repacked(blocks, step, mesh) for place, blocks in held.items()}
            leg = Leg(step=step, peers=(), sent=(), received=(), held=held[rank])
        legs.append(leg)
    return tuple(legs)


def _exchange(step: Step, mesh: Mesh, held: Held, rank: int) -> tuple[Leg, Held]:
    if step.before == "node" and "local" in step.arguments:
        raise ConfigError("an all-to-all program must expand rows merged per node before it exchanges along local")
    boxes = {place: _boxes(blocks, place, step, mesh) for place, blocks in held.items()}
    after = {place: tuple(block for peer in boxes[place] for block in boxes[peer][place]) for place in held}
    peers = tuple(boxes[rank])
    leg = Leg(
        step=step,
        peers=peers,
        sent=tuple(tuple(boxes[rank][peer]) for peer in peers),
        received=tuple(tuple(boxes[peer][rank]) for peer in peers),
        held=after[rank],
    )
    return leg, after


def _boxes(blocks: Sequence[Block], holder: int, step: Step, mesh: Mesh) -> dict[int, list[Block]]:
    """The blocks of one rank by the peer they go to; peers in order."""
    boxes: dict[int, list[Block]] = {peer: [] for peer in _peers(mesh, holder, step.arguments)}
    for block in blocks:
        boxes[_towards(block, holder, step, mesh)].append(block)
    return boxes


def _towards(block: Block, holder: int, step: Step, mesh: Mesh) -> int:
    node, local = mesh.place(holder)
    to_node, to_local = (block[1], local) if step.before == "node" else mesh.place(block[1])
    axes: Sequence[Axis] = step.arguments
    return mesh.rank(to_node if "node" in axes else node, to_local if "local" in axes else local)


def _peers(mesh: Mesh, rank: int, axes: Sequence[Axis]) -> tuple[int, ...]:
    node, local = mesh.place(rank)
    nodes = range(mesh.nodes) if "node" in axes else (node,)
    locals_ = range(mesh.local) if "local" in axes else (local,)
    return tuple(mesh.rank(n, lo) for n in nodes for lo in locals_)


def _repacked(blocks: Sequence[Block], step: Step, mesh: Mesh) -> tuple[Block, ...]:
    """The blocks after dedup or expand: those of a node's ranks become one, or one becomes those."""
    before: Packing = step.before
    if step.after == "node" and before != "node":
        return tuple(dict.fromkeys((source, to // mesh.local) for source, to in blocks))
    if before == "node" and step.after != "node":
        ranks = range(mesh.local)
        return tuple((source, mesh.rank(node, local)) for source, node in blocks for local in ranks)
    return tuple(blocks)
