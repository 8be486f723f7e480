"""From tokens to the experts and back: with rows in between, or in one pass where the backend does all of it."""

from torch import Tensor, nn

from turnout.contracts import ExpertBackend, FusedBackend
from turnout.dispatch import combine, pack, plan_dispatch, unpack
from turnout.tensors import Admission, Assignment


def pass_experts(
    experts: nn.Module, backend: ExpertBackend, x_TD: Tensor, assignment: Assignment, admission: Admission
) -> Tensor:
    """y[t] = sum of weight * expert(x[t]) over the token's admitted assignments; zeros for a token without one.

    Shapes: x_TD (T, D); returns (T, D) in the dtype of x_TD.
    """
    if isinstance(backend, FusedBackend):
        return backend.run_tokens(experts, x_TD, assignment, admission)
    plan = plan_dispatch(assignment, admission)
    rows = pack(x_TD, plan, layout=backend.layout, capacity=_width(admission, assignment))
    return combine(unpack(backend.run(experts, rows), plan), assignment, plan)


def _width(admission: Admission, assignment: Assignment) -> int | None:
    """Rows of an expert's block: no more than there are assignments, whatever the policy would have room for."""
    return None if admission.capacity is None else min(admission.capacity, len(assignment.token_N))
