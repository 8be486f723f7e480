"""One all-to-all, differentiable: rows, and where tokens are merged the labels that travel in the same message."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from turnout.comm.ledger import Kind, Ledger, Phase
from turnout.comm.pairwise import MOST, Pairwise
from turnout.comm.shared_memory import SharedLine
from turnout.errors import TransportError
from turnout.tensors import first_order

Splits = tuple[tuple[int, ...], tuple[int, ...]]  # entries for each peer, entries from each peer


@dataclass(frozen=True, kw_only=True)
class Route:
    """Who gets how much in one exchange; the same in both directions of a call and of its gradient."""

    group: ProcessGroup
    peers: tuple[int, ...]  # ranks of the expert group, in order of the process group
    rank: int  # this rank, in the expert group
    rows: Splits
    labels: Splits
    ledger: Ledger
    layer: str
    kind: Kind = "rows"
    shared: SharedLine | None = None  # the group's shared memory, which rows on CPUs then take
    far: bool = False  # its ranks are on several nodes

    def turned(self) -> "Route":
        """The same way back."""
        return replace(self, rows=self.rows[::-1], labels=self.labels[::-1])


def send_rows(rows_ND: Tensor, route: Route) -> "SentRows":
    """Begin to send rows to the peers; nothing waits before `land`. Shapes: rows_ND (N, D), by peer."""
    trip = _Trip(route)
    return SentRows(token=_Depart.apply(trip, rows_ND), trip=trip)


def send_labelled(rows_ND: Tensor, weight_J: Tensor, row_J: Tensor, route: Route) -> "SentLabelled":
    """Begin to send rows with their labels: which row of its block an assignment takes, and its weight.

    The weight has a gradient. Shapes: rows_ND (N, D); weight_J, row_J (J,), by peer.
    """
    trip = _Trip(route)
    return SentLabelled(token=_DepartLabelled.apply(trip, rows_ND, weight_J, row_J), trip=trip)


@dataclass(frozen=True, kw_only=True)
class SentRows:
    """Rows on their way."""

    token: Tensor  # ties both ends together for autograd
    trip: "_Trip"

    def land(self) -> Tensor:
        """Wait for the rows that the peers send here, peer by peer. Shapes: returns (M, D)."""
        return _Land.apply(self.token, self.trip)


@dataclass(frozen=True, kw_only=True)
class SentLabelled:
    """Rows and labels on their way."""

    token: Tensor
    trip: "_Trip"

    def land(self) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for what the peers send here: rows (M, D), weights (I,), rows of labels (I,)."""
        return _LandLabelled.apply(self.token, self.trip)


class Flight:
    """One all-to-all of several tensors, all in one message a peer, from its begin until `land`.

    gloo moves it on threads of its own, NCCL on a stream of its own: `land` makes the host wait for the one, and the
    current stream for the other.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Splits]], route: Route, phase: Phase) -> None:
        for_peer, from_peer = (_bytes_by_peer(parts, way) for way in (0, 1))
        noted = {peer: sent for peer, sent in zip(route.peers, for_peer, strict=True) if peer != route.rank}
        route.ledger.note(route.layer, phase, route.kind, noted)
        self._parts, self._route = parts, route
        if len(parts) == 1:
            tensor, (sent, received) = parts[0]
            # held on to until it has landed
            self._sent = tensor.contiguous()
            self._out = tensor.new_empty(sum(received), *tensor.shape[1:])
        else:
            sent, received = for_peer, from_peer
            self._sent = _packed([tensor for tensor, _ in parts], [splits[0] for _, splits in parts])
            self._out = self._sent.new_empty(sum(received))
        self._work = None
        if route.shared is not None and self._sent.device.type == "cpu":
            # through memory a rank copies by itself, now: nothing is on its way meanwhile
            with named("all-to-all", route.layer, route.group, route.ledger):
                self._out = route.shared.all_to_all(self._sent, received, sent)
            return
        with _naming("all-to-all", route.layer, route.group):
            self._work = begun(self._out, self._sent, received, sent, route)

    def land(self) -> list[Tensor]:
        """What arrived, tensor by tensor."""
        route = self._route
        if self._work is not None:
            with named("all-to-all", route.layer, route.group, route.ledger):
                self._work.wait()
        if len(self._parts) == 1:
            return [self._out]
        return _unpacked(self._out, [tensor for tensor, _ in self._parts], [splits[1] for _, splits in self._parts])


def begun(
    out: Tensor, sent: Tensor, received: Sequence[int], leave: Sequence[int], route: Route
) -> Pairwise | dist.Work | None:
    """An all-to-all that has begun: so many entries from each peer into `out`, and for each of `sent`."""
    if route.far and sent.device.type == "cpu" and route.group.size() <= MOST:
        return Pairwise(out, sent, received, leave, route.group)
    return dist.all_to_all_single(out, sent, list(received), list(leave), group=route.group, async_op=True)


@contextmanager
def named(collective: str, layer: str, group: ProcessGroup, ledger: Ledger) -> Iterator[None]:
    """Raises: TransportError that names this rank, the layer and its peers where a collective inside fails."""
    with _naming(collective, layer, group), ledger.inside(f"{collective} of {layer}"):
        yield


@contextmanager
def _naming(collective: str, layer: str, group: ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TransportError(
            f"rank {dist.get_rank()}: the {collective} of {layer} with ranks {dist.get_process_group_ranks(group)} "
            f"failed, because one of them ended or took too long: {error}"
        ) from error


def _packed(tensors: Sequence[Tensor], sent: Sequence[Sequence[int]]) -> Tensor:
    """Bytes for each peer in turn: its entries of the first tensor, then those of the next."""
    pieces = [_as_bytes(tensor).split(list(splits)) for tensor, splits in zip(tensors, sent, strict=True)]
    return torch.cat([piece.reshape(-1) for of_peer in zip(*pieces, strict=True) for piece in of_peer])


def _unpacked(arrived: Tensor, like: Sequence[Tensor], received: Sequence[Sequence[int]]) -> list[Tensor]:
    lengths = [
        [_entry_bytes(tensor) * number for number in numbers] for tensor, numbers in zip(like, received, strict=True)
    ]
    pieces = iter(arrived.split([length for of_peer in zip(*lengths, strict=True) for length in of_peer]))
    by_tensor: list[list[Tensor]] = [[] for _ in like]
    for _ in received[0]:
        for mine in by_tensor:
            mine.append(next(pieces))
    return [
        # joined anew, so that every element starts where its size allows
        torch.cat(mine).view(tensor.dtype).view(sum(numbers), *tensor.shape[1:])
        for mine, tensor, numbers in zip(by_tensor, like, received, strict=True)
    ]


def _as_bytes(tensor: Tensor) -> Tensor:
    """Shapes: (N, ...); returns (N, bytes of an entry)."""
    return tensor.reshape(len(tensor), tensor.shape[1:].numel()).contiguous().view(torch.uint8)


def _bytes_by_peer(parts: Sequence[tuple[Tensor, Splits]], way: int) -> list[int]:
    lengths = [[_entry_bytes(tensor) * number for number in splits[way]] for tensor, splits in parts]
    return [sum(of_peer) for of_peer in zip(*lengths, strict=True)]


def _entry_bytes(tensor: Tensor) -> int:
    return tensor.element_size() * tensor.shape[1:].numel()


class _Trip:
    """One exchange and that of its gradients, which autograd's two ends of it share.

    Autograd takes the last node first, so what was begun early and awaited late in the forward pass is so in the
    backward one: the pipeline runs in reverse.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self.flight: Flight | None = None

    def depart(self, parts: Sequence[tuple[Tensor, Splits]], phase: Phase) -> None:
        self.flight = Flight(parts, self.route if phase == "forward" else self.route.turned(), phase)

    def land(self) -> list[Tensor]:
        flight, self.flight = self.flight, None
        assert flight is not None
        return flight.land()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: _Trip, rows_ND: Tensor) -> Tensor:
        ctx.trip = trip
        trip.depart([(rows_ND, trip.route.rows)], "forward")
        return rows_ND.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.trip.land()[0]


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.land()[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.trip.depart([(grads[0], ctx.trip.route.turned().rows)], "backward")
        return grads[0].new_empty(0), None


class _DepartLabelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: _Trip, rows_ND: Tensor, weight_J: Tensor, row_J: Tensor) -> Tensor:
        ctx.trip, route = trip, trip.route
        parts = [(rows_ND, route.rows), (row_J.to(torch.int32), route.labels), (weight_J, route.labels)]
        trip.depart(parts, "forward")
        return rows_ND.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_rows, grad_weight = ctx.trip.land()
        return None, grad_rows, grad_weight, None


class _LandLabelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, trip: _Trip) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trip = trip
        rows, row, weight = trip.land()
        row = row.to(torch.int64)
        ctx.mark_non_differentiable(row)
        return rows, weight, row

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        back = ctx.trip.route.turned()
        ctx.trip.depart([(grads[0], back.rows), (grads[1], back.labels)], "backward")
        return grads[0].new_empty(0), None
