"""Bytes and messages of a program's collectives under a routing: per rank and link, and per pair of ranks."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from turnout.alltoall.counting import Move
from turnout.alltoall.expected import LoadedRouting, UniformRouting
from turnout.alltoall.routed import RoutedTokens
from turnout.alltoall.transport import Axis
from turnout.topology import Mesh

Routing = RoutedTokens | UniformRouting | LoadedRouting


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank hands to the network, on average over ranks; rows that stay on their rank are not in it."""

    intra_bytes: float = 0.0  # to ranks of the same node
    inter_bytes: float = 0.0  # to other nodes
    intra_messages: float = 0.0  # point-to-point sends, empty ones too
    inter_messages: float = 0.0
    cross_bytes: float = 0.0  # of inter_bytes, to another place of another node: off the sender's rail
    cross_messages: float = 0.0

    @property
    def total_bytes(self) -> float:
        return self.intra_bytes + self.inter_bytes

    @property
    def messages(self) -> float:
        return self.intra_messages + self.inter_messages

    @classmethod
    def between(cls, sender: int, receiver: int, mesh: Mesh, sent_bytes: float, messages: float = 0.0) -> "Traffic":
        """What one rank of a mesh sends to another."""
        (node, local), (other, place) = mesh.place(sender), mesh.place(receiver)
        if node == other:
            return cls(intra_bytes=sent_bytes, intra_messages=messages)
        if local == place:
            return cls(inter_bytes=sent_bytes, inter_messages=messages)
        return cls(inter_bytes=sent_bytes, inter_messages=messages, cross_bytes=sent_bytes, cross_messages=messages)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def times(self, factor: float) -> "Traffic":
        """The same, `factor` times over."""
        return Traffic(**{name: value * factor for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class RowSize:
    """Bytes on the wire."""

    row_bytes: float  # of one token's vector on the way to the experts, its scales included
    back_bytes: float  # of one on the way back
    label_bytes: float = 0.0  # of one assignment of a merged row (its row, its weight), which travels on the way there
    label_back_bytes: float = 0.0  # of one on the way back: the gradient of its weight


Pairs = dict[tuple[int, int], list[float]]  # (sender, receiver) -> [bytes, messages]


def traffic_of(moves: tuple[Move, ...], routing: Routing, size: RowSize, *, tensor: int = 1) -> Traffic:
    """Bytes and messages a rank sends in `moves`, averaged over ranks (expected ones under uniform routing)."""
    total, mesh = Traffic(), routing.mesh
    for (sender, receiver), (sent_bytes, messages) in pairs_of(moves, routing, size, tensor=tensor).items():
        total += Traffic.between(sender // tensor, receiver // tensor, mesh, sent_bytes, messages)
    return total.times(1 / (len(routing.sources) * tensor))


def pairs_of(moves: tuple[Move, ...], routing: Routing, size: RowSize, *, tensor: int = 1) -> Pairs:
    """Bytes and messages between ranks; rank = place * tensor + tensor index.

    Under uniform routing rank 0 stands for all sources, and one rank of each kind for all of that kind.
    """
    pairs: Pairs = defaultdict(lambda: [0.0, 0.0])
    for move in moves:
        for index in range(tensor):
            share = routing.share(index, tensor) if move.sharded else routing
            if move.axes:
                _add_exchange(pairs, move, share, size, index, tensor)
            else:
                _add_gather(pairs, move, share, size, index, tensor)
    return dict(pairs)


def _add_exchange(pairs: Pairs, move: Move, routing: Routing, size: RowSize, index: int, tensor: int) -> None:
    for place in routing.sources:
        for peer, times in _peers(routing, place, move.axes):
            pairs[place * tensor + index, peer * tensor + index][1] += times
    for before, after, block_bytes in _blocks(move, routing, size):
        if before != after:
            ends = (after, before) if move.back else (before, after)
            pairs[ends[0] * tensor + index, ends[1] * tensor + index][0] += block_bytes


def _add_gather(pairs: Pairs, move: Move, routing: Routing, size: RowSize, index: int, tensor: int) -> None:
    """An all-gather among tensor-parallel ranks of rows at the experts, or its transpose, or one of tokens."""
    held = dict.fromkeys(routing.sources, 0.0)
    if move.whole_tokens:
        held = {place: routing.tokens(place) * size.back_bytes for place in routing.sources}
    else:
        for holder, _, block_bytes in _blocks(move, routing, size):
            held[holder] = held.get(holder, 0.0) + block_bytes
    for place, place_bytes in held.items():
        for other in range(tensor):
            if other == index:
                continue
            # a reduce-scatter sends each peer the share that peer keeps, an all-gather its own share to each
            reduces = move.back and not move.whole_tokens
            ends = (other, index) if reduces else (index, other)
            pair = pairs[place * tensor + ends[0], place * tensor + ends[1]]
            pair[0] += place_bytes
            pair[1] += place in routing.sources


def _blocks(move: Move, routing: Routing, size: RowSize) -> Iterator[tuple[int, int, float]]:
    """(holder nearer the source, holder nearer the expert, bytes) of every block that takes part in `move`."""
    mesh = routing.mesh
    merged_bytes = 0.0
    if move.packing != "assignment":
        merged_bytes = size.label_back_bytes if move.back else size.label_bytes
    row_bytes = size.back_bytes if move.back else size.row_bytes
    for source in routing.sources:
        for destination, times in routing.destinations_of(source):
            # a block packed per node has no local destination yet; the source's stands for all
            if move.packing == "node" and destination % mesh.local != source % mesh.local:
                continue
            rows = routing.rows(move.packing, source, destination)
            labels = routing.labels(move.packing, source, destination) if merged_bytes else 0
            before = _holder(mesh, source, destination, move.arrived)
            after = _holder(mesh, source, destination, move.arrived | set(move.axes))
            yield before, after, times * (rows * row_bytes + labels * merged_bytes)


def _holder(mesh: Mesh, source: int, destination: int, arrived: frozenset[Axis]) -> int:
    node = (destination if "node" in arrived else source) // mesh.local
    local = (destination if "local" in arrived else source) % mesh.local
    return node * mesh.local + local


def _peers(routing: Routing, place: int, axes: tuple[Axis, ...]) -> Iterator[tuple[int, int]]:
    """Ranks that `place` exchanges with, and for how many each stands."""
    for peer, times in routing.destinations_of(place):
        if peer != place and _holder(routing.mesh, place, peer, frozenset(axes)) == peer:
            yield peer, times
