"""Rows back to tokens, weighted: the one place where an assignment's weight is applied."""

from typing import Any

import torch
from torch import Tensor

from turnout.dispatch.permute import sum_rows_by_token
from turnout.tensors import Assignment, DispatchPlan, first_order


def combine(y_MD: Tensor, assignment: Assignment, plan: DispatchPlan) -> Tensor:
    """y[t] = sum of weight * row over the token's rows, added in at least float32 in a fixed order.

    Shapes: y_MD (M, D) in dispatch order; returns (T, D) in the dtype of y_MD, zeros for tokens without rows.
    """
    weight_M = assignment.weight_N.index_select(0, plan.assignment_M)
    return _WeightedSum.apply(y_MD, weight_M, plan)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weight_M: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.save_for_backward(y_MD, weight_M)
        ctx.plan = plan
        wide = torch.promote_types(y_MD.dtype, weight_M.dtype)
        return sum_rows_by_token(y_MD.to(wide).contiguous(), plan, weight_M.to(wide)).to(y_MD.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_MD, weight_M = ctx.saved_tensors
        wide = torch.promote_types(y_MD.dtype, weight_M.dtype)
        grad_MD = grads[0].index_select(0, ctx.plan.token_M).to(wide)
        grad_weight_M = torch.linalg.vecdot(grad_MD, y_MD.to(wide)).to(weight_M.dtype)
        return grad_MD.mul_(weight_M.to(wide).unsqueeze(1)).to(y_MD.dtype), grad_weight_M, None
