"""Rows back to tokens, weighted: the one place where an assignment's weight is applied."""

from torch import Tensor

from turnout.dispatch.permute import by_token
from turnout.segments import weighted_sum
from turnout.tensors import Assignment, DispatchPlan


def combine(y_MD: Tensor, assignment: Assignment, plan: DispatchPlan) -> Tensor:
    """y[t] = sum of weight * row over the token's rows, added in at least float32 in a fixed order.

    Shapes: y_MD (M, D) in dispatch order; returns (T, D) in the dtype of y_MD, zeros for tokens without rows.
    """
    weight_M = assignment.weight_N.index_select(0, plan.assignment_M)
    return weighted_sum(y_MD, weight_M, by_token(plan))
