"""Sums and gathers over tensor-parallel ranks, differentiable; the gradient of each is its exact adjoint.

Every rank has a loss of its own, and what is differentiated is their sum. So the adjoint of a gather is a sum that is
scattered, and that of a sum is a sum; a copy that all ranks hold needs none: its gradients differ from rank to rank,
and their sum is the gradient. `reduce_gradients` adds those up, for weights of every kind with one divisor.

torch has these as DTensor.redistribute, whose gradients are those of one loss that all ranks repeat: a weight that each
rank applies to tokens or heads of its own (norms of heads, routers, heads of the model) would then need a sum of its
own. DTensor's rules know neither our autograd functions nor parts of unequal length, nor does the byte ledger see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turnout.comm.groups import TensorGroup
from turnout.comm.ledger import Ledger, Phase
from turnout.comm.wire import named
from turnout.tensors import first_order


@dataclass(frozen=True, kw_only=True)
class TensorWire:
    """The collectives of one layer."""

    group: TensorGroup
    ledger: Ledger
    layer: str

    def sum(self, x: Tensor) -> Tensor:
        """What the ranks have, added up, on each of them."""
        return _Sum.apply(self, x)

    def gather(self, x: Tensor, lengths: Sequence[int], *, dim: int) -> Tensor:
        """The parts of all ranks, one after another along `dim`, where that of rank r has lengths[r]."""
        return _Gather.apply(self, x, tuple(lengths), dim)

    def scatter_sum(self, x: Tensor, lengths: Sequence[int], *, dim: int) -> Tensor:
        """This rank's part of the sum."""
        return _ScatterSum.apply(self, x, tuple(lengths), dim)

    def all_reduce(self, x: Tensor, phase: Phase) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        size = total.numel() * total.element_size() // self.group.size
        self.note(phase, 2 * size)
        with named("all-reduce", self.layer, self.group.wire, self.ledger):
            self.group.lines.all_reduce(total.view(-1), self.group.wire)
        return total

    def all_gather(self, x: Tensor, lengths: Sequence[int], dim: int, phase: Phase) -> Tensor:
        # blocks of one size, the longest: gloo and NCCL are at their best with those
        width, first = max(lengths), x.movedim(dim, 0)
        block = first.contiguous() if len(first) == width else widened(first, width)
        self.note(phase, block.numel() * block.element_size())
        with named("all-gather", self.layer, self.group.wire, self.ledger):
            out = self.group.lines.all_gather(block, self.group.wire)
        if min(lengths) < width:
            out = torch.cat([each[:length] for each, length in zip(out.split(width), lengths, strict=True)])
        return out.movedim(0, dim)

    def reduce_scatter(self, x: Tensor, lengths: Sequence[int], dim: int, phase: Phase) -> Tensor:
        width, first = max(lengths), x.movedim(dim, 0)
        if min(lengths) < width:
            first = torch.cat([widened(part, width) for part in first.split(list(lengths))])
        sent = first.contiguous()
        self.note(phase, sent.nbytes // self.group.size)
        with named("reduce-scatter", self.layer, self.group.wire, self.ledger):
            out = self.group.lines.reduce_scatter(sent, self.group.wire)
        return out[: lengths[self.group.place]].movedim(0, dim)

    def note(self, phase: Phase, size: int) -> None:
        """As a ring or a direct exchange sends it: so many bytes to each of the others."""
        self.note_each(phase, [size] * self.group.size)

    def note_each(self, phase: Phase, sizes: Sequence[int]) -> None:
        """So many bytes to each rank; what stays here is not noted."""
        others = {place: size for place, size in enumerate(sizes) if place != self.group.place}
        self.ledger.note(self.layer, phase, "tensor", others)


def widened(part: Tensor, width: int) -> Tensor:
    """With rows of zeros at its end. Shapes: returns (width, ...)."""
    wide = part.new_zeros(width, *part.shape[1:])
    wide[: len(part)] = part
    return wide


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: TensorWire, x: Tensor) -> Tensor:
        ctx.wire = wire
        return wire.all_reduce(x, "forward")

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.wire.all_reduce(grads[0], "backward")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: TensorWire, x: Tensor, lengths: tuple[int, ...], dim: int) -> Tensor:
        ctx.wire, ctx.along = wire, (lengths, dim)
        return wire.all_gather(x, lengths, dim, "forward")

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.wire.reduce_scatter(grads[0], *ctx.along, "backward"), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: TensorWire, x: Tensor, lengths: tuple[int, ...], dim: int) -> Tensor:
        ctx.wire, ctx.along = wire, (lengths, dim)
        return wire.reduce_scatter(x, lengths, dim, "forward")

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.wire.all_gather(grads[0], *ctx.along, "backward"), None, None
