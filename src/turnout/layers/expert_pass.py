"""From tokens to the experts and back: with rows in between, or in one pass where one process has all of it."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.func import functional_call

from turnout.contracts import Dispatcher, ExpertBackend, ExpertCall, FusedBackend
from turnout.dispatch import LocalDispatcher, plan_dispatch
from turnout.experts import FFNExperts, RoundedExperts
from turnout.experts.called import CalledExperts, is_called
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

    `experts` and `backend` are this process's, `dispatcher` reaches them and those of the others. Experts that somebody
    watches are called with their rows.
    Shapes: x_TD (T, D); returns (T, D) in the dtype of x_TD.
    Raises: ConfigError if a gradient is to come back through quantised experts, or to the weights of their outputs.
    """
    if isinstance(experts, RoundedExperts):
        # rows alone do not show that a router learns
        experts.check_inference(x_TD, assignment.weight_N)
    if isinstance(backend, FusedBackend) and isinstance(dispatcher, LocalDispatcher) and not is_called(experts):
        return backend.run_tokens(experts, x_TD, assignment, admission)
    call = ExpertCall(
        layout=backend.layout,
        capacity=_width(admission, assignment),
        weights=dict(experts.named_parameters()) if isinstance(experts, FFNExperts) else {},
        compute=lambda rows, weights: _computed(experts, backend, rows, weights),
    )
    return dispatcher.run(x_TD, assignment, plan_dispatch(assignment, admission), call)


def _computed(experts: nn.Module, backend: ExpertBackend, rows: Rows, weights: Mapping[str, Tensor] | None) -> Rows:
    if not isinstance(experts, CalledExperts):
        return backend.run(experts, rows)
    inputs = (rows.x, rows.counts_L, backend)
    y = experts(*inputs) if weights is None else functional_call(experts, dict(weights), inputs)
    return replace(rows, x_MD=y) if isinstance(rows, Ragged) else replace(rows, x_LCD=y)


def _width(admission: Admission, assignment: Assignment) -> int | None:
    """Rows of an expert's block: no more than there are assignments, whatever the policy would have room for."""
    return None if admission.capacity is None else min(admission.capacity, len(assignment.token_N))
