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

    def turned(self) -> "Route":
        """The same way back."""
        return replace(self, rows=self.rows[::-1], labels=self.labels[::-1])


def send_rows(rows_ND: Tensor, route: Route) -> Tensor:
    """The rows that the peers send here, peer by peer. Shapes: rows_ND (N, D), by peer; returns (M, D)."""
    return _SendRows.apply(rows_ND, route)


def send_labelled(rows_ND: Tensor, weight_J: Tensor, row_J: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with their labels: which row of its block an assignment takes, and its weight, which has a gradient.

    Shapes: rows_ND (N, D); weight_J, row_J (J,), by peer; returns the same of what the peers send here.
    """
    return _SendLabelled.apply(rows_ND, weight_J, row_J, route)


def all_to_all(parts: Sequence[tuple[Tensor, Splits]], route: Route, phase: Phase) -> list[Tensor]:
    """Each tensor's entries to their peers, all tensors in one message a peer."""
    for_peer, from_peer = (_bytes_by_peer(parts, way) for way in (0, 1))
    noted = {peer: sent for peer, sent in zip(route.peers, for_peer, strict=True) if peer != route.rank}
    route.ledger.note(route.layer, phase, route.kind, noted)
    if len(parts) == 1:
        tensor, (sent, received) = parts[0]
        return [_exchanged(tensor.contiguous(), received, sent, route)]
    buffer = _packed([tensor for tensor, _ in parts], [splits[0] for _, splits in parts])
    arrived = _exchanged(buffer, from_peer, for_peer, route)
    return _unpacked(arrived, [tensor for tensor, _ in parts], [splits[1] for _, splits in parts])


@contextmanager
def named(collective: str, layer: str, group: ProcessGroup, ledger: Ledger) -> Iterator[None]:
    """Raises: TransportError that names this rank, the layer and its peers where a collective inside fails."""
    try:
        with ledger.inside(f"{collective} of {layer}"):
            yield
    except RuntimeError as error:
        raise TransportError(
            f"rank {dist.get_rank()}: the {collective} of {layer} with ranks {dist.get_process_group_ranks(group)} "
            f"failed, because one of them ended or took too long: {error}"
        ) from error


def _exchanged(tensor: Tensor, received: Sequence[int], sent: Sequence[int], route: Route) -> Tensor:
    with named("all-to-all", route.layer, route.group, route.ledger):
        if route.shared is not None and tensor.device.type == "cpu":
            return route.shared.all_to_all(tensor, received, sent)
        out = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(out, tensor, list(received), list(sent), group=route.group)
        return out


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


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return all_to_all([(rows_ND, route.rows)], route, "forward")[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        back = ctx.route.turned()
        return all_to_all([(grads[0], back.rows)], back, "backward")[0], None


class _SendLabelled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weight_J: Tensor, row_J: Tensor, route: Route
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route = route
        parts = [(rows_ND, route.rows), (row_J.to(torch.int32), route.labels), (weight_J, route.labels)]
        rows, row, weight = all_to_all(parts, route, "forward")
        row = row.to(torch.int64)
        ctx.mark_non_differentiable(row)
        return rows, weight, row

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        back = ctx.route.turned()
        parts = [(grads[0], back.rows), (grads[1], back.labels)]
        grad_rows, grad_weight = all_to_all(parts, back, "backward")
        return grad_rows, grad_weight, None, None
