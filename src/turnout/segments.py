"""Rows picked out of a table by index, and rows summed back into it: each is the other's gradient, in fixed order."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.tensors import first_order


@dataclass(frozen=True, kw_only=True)
class Segments:
    """M rows, each of which belongs to one of T targets."""

    target_M: Tensor
    row_by_target_M: Tensor  # rows again, ordered by target
    offset_T: Tensor  # start of each target's run in row_by_target_M
    one_each: bool = False  # every target has exactly one row


def segments_of(target_M: Tensor, num_targets: int) -> Segments:
    """Shapes: target_M (M,) int64, values below `num_targets`. Nothing is read back from the device."""
    in_order_M, row_M = target_M.to(torch.int32).sort(stable=True)
    first_T = torch.arange(num_targets, dtype=torch.int32, device=target_M.device)
    return Segments(target_M=target_M, row_by_target_M=row_M, offset_T=torch.searchsorted(in_order_M, first_T))


def permutation(target_M: Tensor) -> Segments:
    """Segments of a permutation: every target has one row."""
    row_M = torch.arange(len(target_M), device=target_M.device)
    return Segments(target_M=target_M, row_by_target_M=inverse(target_M), offset_T=row_M, one_each=True)


def inverse(target_M: Tensor) -> Tensor:
    """Where each place of a permutation is taken from, without sorting."""
    row_M = torch.arange(len(target_M), device=target_M.device)
    return torch.empty_like(target_M).index_copy_(0, target_M, row_M)


def gather(x_TD: Tensor, segments: Segments) -> Tensor:
    """x_TD[target_M]; its gradient adds each target's rows in a fixed order instead of scattering.

    Shapes: x_TD (T, D); returns (M, D).
    """
    return _Gather.apply(x_TD, segments)


def weighted_sum(rows_MD: Tensor, weight_M: Tensor | None, segments: Segments) -> Tensor:
    """Each target's rows, weighted and added in at least float32 in a fixed order; zeros for a target without rows.

    Shapes: rows_MD (M, D); weight_M (M,) or None for ones; returns (T, D) in the dtype of the rows.
    """
    if weight_M is None:
        return _Sum.apply(rows_MD, segments)
    return _WeightedSum.apply(rows_MD, weight_M, segments)


def _add_up(rows_MD: Tensor, segments: Segments, weight_M: Tensor | None) -> Tensor:
    num_targets = len(segments.offset_T)
    if len(rows_MD) == 0 or num_targets == 0:
        return rows_MD.new_zeros(num_targets, rows_MD.shape[1])
    order_M = segments.row_by_target_M
    if segments.one_each and weight_M is None:
        return rows_MD.index_select(0, order_M)
    weight = None if weight_M is None else weight_M.index_select(0, order_M)
    return F.embedding_bag(order_M, rows_MD, segments.offset_T, mode="sum", per_sample_weights=weight)


def _wide_sum(rows_MD: Tensor, segments: Segments) -> Tensor:
    wide = torch.promote_types(rows_MD.dtype, torch.float32)
    return _add_up(rows_MD.to(wide).contiguous(), segments, None).to(rows_MD.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return x_TD.index_select(0, segments.target_M)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _wide_sum(grads[0], ctx.segments), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return _wide_sum(rows_MD, segments)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].index_select(0, ctx.segments.target_M), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weight_M: Tensor, segments: Segments) -> Tensor:
        ctx.save_for_backward(rows_MD, weight_M)
        ctx.segments = segments
        wide = torch.promote_types(rows_MD.dtype, weight_M.dtype)
        return _add_up(rows_MD.to(wide).contiguous(), segments, weight_M.to(wide)).to(rows_MD.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_MD, weight_M = ctx.saved_tensors
        wide = torch.promote_types(rows_MD.dtype, weight_M.dtype)
        grad_MD = grads[0].index_select(0, ctx.segments.target_M).to(wide)
        grad_weight_M = torch.linalg.vecdot(grad_MD, rows_MD.to(wide)).to(weight_M.dtype)
        return grad_MD.mul_(weight_M.to(wide).unsqueeze(1)).to(rows_MD.dtype), grad_weight_M, None
