"""The dispatcher of tensor-parallel ranks that all have the same tokens: each sends a share of them."""

from dataclasses import replace

from torch import Tensor

from turnout.comm import TensorWire
from turnout.contracts import Dispatcher, ExpertCall
from turnout.dispatch import plan_dispatch
from turnout.tensors import Admission, Assignment, DispatchPlan


class OwnTokens(Dispatcher):
    """A run of the tokens goes to the experts by another dispatcher; then ranks gather what came back.

    Routing, capacity, losses and statistics are those of all tokens, on every rank alike.
    """

    def __init__(self, inner: Dispatcher, wire: TensorWire) -> None:
        self._inner, self._wire = inner, wire

    def run(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: ExpertCall) -> Tensor:
        ranks, place = self._wire.group.size, self._wire.group.place
        lengths = [(len(x_TD) + ranks - 1 - rank) // ranks for rank in range(ranks)]
        first, length = sum(lengths[:place]), lengths[place]
        own, admission = _of_run(assignment, plan, first, length)
        y_TD = self._inner.run(x_TD.narrow(0, first, length), own, plan_dispatch(own, admission), experts)
        return self._wire.gather(y_TD, lengths, dim=0)


def _of_run(assignment: Assignment, plan: DispatchPlan, first: int, length: int) -> tuple[Assignment, Admission]:
    """The choices of so many tokens from `first` on, and which of them are sent."""
    token_N = assignment.token_N
    own_N = ((token_N >= first) & (token_N < first + length)).nonzero().squeeze(1)
    sent_N = token_N.new_zeros(len(token_N)).index_fill_(0, plan.assignment_M, 1).bool()
    every = ("token_N", "expert_N", "weight_N", "choice_N", "declined_N", "priority_N")
    picked = {name: value[own_N] for name in every if (value := getattr(assignment, name)) is not None}
    picked["token_N"] = picked["token_N"] - first
    own = replace(assignment, **picked, num_tokens=length)
    return own, Admission(keep_N=sent_N[own_N], capacity=None, dropped_E={})
