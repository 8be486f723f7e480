"""Tokens to rows ordered by expert, and back."""

from typing import Literal

import torch
from torch import Tensor

from turnout.segments import Segments, gather, inverse
from turnout.tensors import Admission, Assignment, DispatchPlan, Padded, Ragged, Rows


def plan_dispatch(assignment: Assignment, admission: Admission) -> DispatchPlan:
    """Order the kept assignments by expert, then by their place in the assignment."""
    num_tokens, num_experts = assignment.num_tokens, assignment.num_experts
    kept_M = None if admission.keep_N is None else admission.keep_N.nonzero().squeeze(1)
    expert_in_order = assignment.expert_N if kept_M is None else assignment.expert_N[kept_M]
    token_in_order = assignment.token_N if kept_M is None else assignment.token_N[kept_M]
    counts_E = assignment.counts_E if kept_M is None else torch.bincount(expert_in_order, minlength=num_experts)
    order_M = _argsort(expert_in_order, num_experts)
    row_M = inverse(order_M)
    if assignment.top_k is None:
        by_token_M = _argsort(token_in_order, num_tokens)
        row_M = row_M[by_token_M]
    taken_T = torch.bincount(token_in_order, minlength=num_tokens)
    return DispatchPlan(
        assignment_M=order_M if kept_M is None else kept_M[order_M],
        token_M=token_in_order[order_M],
        counts_E=counts_E,
        row_by_token_M=row_M,
        row_offset_T=taken_T.cumsum(0) - taken_T,
    )


def reordered(plan: DispatchPlan, order_S: Tensor) -> DispatchPlan:
    """The same rows with the experts in another order, those of each as they were; nothing is read back.

    Counts are by place in that order. Shapes: order_S (E,), the expert at each place.
    """
    counts_E, num_rows = plan.counts_E, len(plan.token_M)
    counts_S = counts_E[order_S]
    shift_S = (counts_E.cumsum(0) - counts_E)[order_S] - (counts_S.cumsum(0) - counts_S)
    rows_M = torch.arange(num_rows, device=counts_E.device)
    return _taken(plan, counts_S, rows_M + shift_S.repeat_interleave(counts_S, output_size=num_rows))


def dealt_out(
    plan: DispatchPlan, slot_P: Tensor, expert_P: Tensor, first_P: Tensor, stride_P: Tensor, *, num_slots: int
) -> DispatchPlan:
    """The same rows in slots, of which an expert may have several; nothing is read back.

    Piece by piece, in the order of their slots, every stride-th of the rows for an expert, from its first on, goes to a
    slot; every row is in one piece. Counts are by slot. Shapes: (P,) for each piece.
    """
    counts_E = plan.counts_E
    counts_P = (counts_E[expert_P] - first_P + stride_P - 1).div(stride_P, rounding_mode="floor").clamp(min=0)
    counts_S = counts_E.new_zeros(num_slots).index_add_(0, slot_P, counts_P)
    start_P = (counts_E.cumsum(0) - counts_E)[expert_P] + first_P
    begin_P = counts_P.cumsum(0) - counts_P
    rows_M = torch.arange(len(plan.token_M), device=counts_E.device)
    piece_M = torch.repeat_interleave(counts_P, output_size=len(rows_M))
    return _taken(plan, counts_S, start_P[piece_M] + (rows_M - begin_P[piece_M]) * stride_P[piece_M])


def _taken(plan: DispatchPlan, counts_S: Tensor, was_M: Tensor) -> DispatchPlan:
    """The rows of a plan in another order: each was which one."""
    return DispatchPlan(
        assignment_M=plan.assignment_M[was_M],
        token_M=plan.token_M[was_M],
        counts_E=counts_S,
        row_by_token_M=inverse(was_M)[plan.row_by_token_M],
        row_offset_T=plan.row_offset_T,
    )


def pack(x_TD: Tensor, plan: DispatchPlan, *, layout: Literal["ragged", "padded"], capacity: int | None = None) -> Rows:
    """Rows for the experts; differentiable in x_TD.

    `capacity` fixes the width of the padded layout without asking the device; without it the fullest expert does.
    Shapes: x_TD (T, D); returns Ragged x_MD (M, D), or Padded x_LCD (E, C, D) with zeros past each count.
    """
    x_MD = gather(x_TD, by_token(plan))
    if layout == "ragged":
        return Ragged(x_MD=x_MD, counts_L=plan.counts_E)
    num_experts = len(plan.counts_E)
    width = int(plan.counts_E.max()) if capacity is None else capacity
    padded = x_MD.new_zeros(num_experts * width, x_MD.shape[1]).index_copy_(0, _slots(plan, width), x_MD)
    return Padded(x_LCD=padded.view(num_experts, width, x_MD.shape[1]), counts_L=plan.counts_E)


def unpack(rows: Rows, plan: DispatchPlan) -> Tensor:
    """The rows in dispatch order again: (M, D)."""
    if isinstance(rows, Ragged):
        return rows.x_MD
    return rows.x_LCD.flatten(0, 1).index_select(0, _slots(plan, rows.x_LCD.shape[1]))


def by_token(plan: DispatchPlan) -> Segments:
    """The dispatched rows as runs of their tokens."""
    return Segments(target_M=plan.token_M, row_by_target_M=plan.row_by_token_M, offset_T=plan.row_offset_T)


def _argsort(key_N: Tensor, num_keys: int) -> Tensor:
    # narrow keys sort several times faster on CPU
    narrow = torch.int16 if num_keys <= 1 << 15 else torch.int32
    return key_N.to(narrow).argsort(stable=True)


def _slots(plan: DispatchPlan, width: int) -> Tensor:
    """Row of each dispatched row in the padded block."""
    counts_E = plan.counts_E
    num_rows = len(plan.token_M)
    expert_M = torch.repeat_interleave(
        torch.arange(len(counts_E), device=counts_E.device), counts_E, output_size=num_rows
    )
    start_E = counts_E.cumsum(0) - counts_E
    return expert_M * width + torch.arange(num_rows, device=counts_E.device) - start_E[expert_M]
