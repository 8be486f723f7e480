"""The dispatcher of one process that has all experts: nothing is sent."""

from typing import Literal

from torch import Tensor

from turnout.contracts import Dispatched, Dispatcher
from turnout.dispatch.combine import combine
from turnout.dispatch.permute import pack, unpack
from turnout.tensors import Assignment, DispatchPlan


class LocalDispatcher(Dispatcher):
    """Packs the rows and combines what comes out."""

    def dispatch(
        self,
        x_TD: Tensor,
        assignment: Assignment,
        plan: DispatchPlan,
        *,
        layout: Literal["ragged", "padded"],
        capacity: int | None,
    ) -> Dispatched:
        return Dispatched(
            rows=pack(x_TD, plan, layout=layout, capacity=capacity),
            combine=lambda rows: combine(unpack(rows, plan), assignment, plan),
        )
