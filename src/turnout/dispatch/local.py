"""The dispatcher of one process that has all experts: nothing is sent."""

from torch import Tensor

from turnout.contracts import Dispatcher, ExpertCall
from turnout.dispatch.combine import combine
from turnout.dispatch.permute import pack, unpack
from turnout.tensors import Assignment, DispatchPlan


class LocalDispatcher(Dispatcher):
    """Packs the rows and combines what comes out."""

    def run(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: ExpertCall) -> Tensor:
        rows = pack(x_TD, plan, layout=experts.layout, capacity=experts.capacity)
        return combine(unpack(experts.compute(rows, None), plan), assignment, plan)
