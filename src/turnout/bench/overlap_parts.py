"""What a step in chunks is made of, on one rank: the step, its exchanges alone and its experts alone.

The exchanges alone are those of the step, as many bytes between the same ranks in the same order, ready and unread; the
experts alone compute the rows that came here, chunk by chunk. Routing, ordering and adding up of rows are in neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turnout.bench.turns import Work
from turnout.comm import ExpertGroup, Ledger
from turnout.comm.cuts import cut_plan
from turnout.comm.sizes import Sizes, exchange_sizes
from turnout.comm.wire import Flight, Route
from turnout.contracts import Dispatcher, ExpertCall
from turnout.layers import MoE
from turnout.parallel.pipeline import Way, pipelined
from turnout.placement import Placement
from turnout.tensors import Assignment, DispatchPlan, Rows


class Listening(Dispatcher):
    """Another dispatcher; it keeps what that one was given and what that one gave the experts."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.plan: DispatchPlan | None = None
        self.experts: ExpertCall | None = None
        self.rows: list[Rows] = []

    def run(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: ExpertCall) -> Tensor:
        self.plan, self.experts, self.rows = plan, experts, []

        def compute(rows: Rows, weights: object) -> Rows:
            self.rows.append(rows)
            return experts.compute(rows, None)

        return self._dispatcher.run(x_TD, assignment, plan, replace(experts, compute=compute))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One number of chunks."""

    step: Work
    exchanges: Work
    experts: Work


def parts_of(
    layer: MoE, dispatcher: Dispatcher, x_TD: Tensor, group: ExpertGroup, chunks: int, *, train: bool
) -> Parts:
    """Every rank calls it; one step runs, which says what the others are to repeat."""
    listening = Listening(dispatcher)
    layer.reach(listening)
    layer(x_TD)
    assert listening.plan is not None
    assert listening.experts is not None
    return Parts(
        step=_step(layer, dispatcher, x_TD, train=train),
        exchanges=_exchanges(listening.plan, x_TD, group, layer.config.num_experts, chunks, passes=2 if train else 1),
        experts=_experts(listening.experts, listening.rows, layer, train=train),
    )


def _step(layer: MoE, dispatcher: Dispatcher, x_TD: Tensor, *, train: bool) -> Work:
    given_TD = x_TD.clone().requires_grad_(train)
    grad_TD = torch.randn_like(x_TD)

    def step() -> None:
        layer.reach(dispatcher)
        if not train:
            with torch.no_grad():
                layer(given_TD)
            return
        forget((given_TD, *layer.parameters()))
        layer(given_TD).y.backward(grad_TD)

    return step


def _experts(experts: ExpertCall, rows: Sequence[Rows], layer: MoE, *, train: bool) -> Work:
    own = [_own(each, train=train) for each in rows]
    grads = [torch.randn_like(each.x) for each in rows]

    def compute() -> None:
        if not train:
            with torch.no_grad():
                for each in own:
                    experts.compute(each, None)
            return
        forget((*(each.x for each in own), *layer.parameters()))
        made = [experts.compute(each, None).x for each in own]
        torch.autograd.backward(made, grads)

    return compute


def _own(rows: Rows, *, train: bool) -> Rows:
    x = rows.x.detach().clone().requires_grad_(train)
    return replace(rows, **{"x_MD" if x.ndim == 2 else "x_LCD": x})


def forget(tensors: Sequence[Tensor]) -> None:
    """Their gradients are gone."""
    for each in tensors:
        each.grad = None


def _exchanges(
    plan: DispatchPlan, x_TD: Tensor, group: ExpertGroup, num_experts: int, chunks: int, *, passes: int
) -> Work:
    """The counts of rows once, then each pass there and back."""
    placement, counts_GE = Placement.even(num_experts, group.size), cut_plan(plan, len(x_TD), chunks).counts_GE

    def agree() -> list[Sizes]:
        return exchange_sizes(counts_GE, {}, group, placement, ledger=Ledger(), layer="counts")

    trips = [_Trip(sizes, group, x_TD.shape[1]) for sizes in agree()]

    def exchange() -> None:
        agree()
        for _ in range(passes):
            pipelined([trip.there() for trip in trips], _Trip.back)

    return exchange


class _Trip:
    """A chunk's rows, ready, and whoever gets how many of them."""

    def __init__(self, sizes: Sizes, group: ExpertGroup, dim: int) -> None:
        ranks = range(group.size)
        leave = tuple(sizes.rows("assignment", (group.rank, to)) for to in ranks)
        come = tuple(sizes.rows("assignment", (source, group.rank)) for source in ranks)
        self._leaving_ND, self._coming_MD = torch.zeros(sum(leave), dim), torch.zeros(sum(come), dim)
        self._route = Route(
            group=group.whole,
            peers=tuple(ranks),
            rank=group.rank,
            rows=(leave, come),
            labels=((), ()),
            ledger=Ledger(),
            layer="exchanges",
            far=group.mesh.nodes > 1,
        )

    def there(self) -> "Way[_Trip]":
        flight = Flight([(self._leaving_ND, self._route.rows)], self._route, "forward")
        yield
        flight.land()
        return self

    def back(self) -> Way[None]:
        route = self._route.turned()
        flight = Flight([(self._coming_MD, route.rows)], route, "forward")
        yield
        flight.land()
