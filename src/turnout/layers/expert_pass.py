"""From tokens to the experts and back: with rows in between, or in one pass where one process has all of it."""

from dataclasses import replace

from torch import Tensor, nn

from turnout.contracts import Dispatcher, ExpertBackend, FusedBackend
from turnout.dispatch import LocalDispatcher, plan_dispatch
from turnout.experts import FFNExperts
from turnout.tensors import Admission, Assignment, Ragged, Rows


def pass_experts(
    experts: nn.Module,
    backend: ExpertBackend,
    x_TD: Tensor,
    assignment: Assignment,
    admission: Admission,
    *,
    dispatcher: Dispatcher,
) -> Tensor:
    """y[t] = sum of weight * expert(x[t]) over the token's admitted assignments; zeros for a token without one.

    `experts` and `backend` are this process's, `dispatcher` reaches them and those of the others.
    Shapes: x_TD (T, D); returns (T, D) in the dtype of x_TD.
    """
    if isinstance(backend, FusedBackend) and isinstance(dispatcher, LocalDispatcher):
        return backend.run_tokens(experts, x_TD, assignment, admission)
    plan = plan_dispatch(assignment, admission)
    capacity = _width(admission, assignment)
    sent = dispatcher.dispatch(x_TD, assignment, plan, layout=backend.layout, capacity=capacity)
    return sent.combine(_computed(experts, backend, sent.rows))


def _computed(experts: nn.Module, backend: ExpertBackend, rows: Rows) -> Rows:
    if not isinstance(experts, FFNExperts):
        return backend.run(experts, rows)
    y = experts(rows.x, rows.counts_L, backend)
    return replace(rows, x_MD=y) if isinstance(rows, Ragged) else replace(rows, x_LCD=y)


def _width(admission: Admission, assignment: Assignment) -> int | None:
    """Rows of an expert's block: no more than there are assignments, whatever the policy would have room for."""
    return None if admission.capacity is None else min(admission.capacity, len(assignment.token_N))
