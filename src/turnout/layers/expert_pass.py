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
    rows = pack(x_TD, plan, layout=backend.layout, capacity=admission.capacity)
    return combine(unpack(backend.run(experts, rows), plan), assignment, plan)
