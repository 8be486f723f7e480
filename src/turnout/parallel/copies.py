"""Gradients of experts that several ranks of a group hold: summed, so that all copies take the same step.

Each copy has seen a part of its expert's rows. One rank of its holders gets the gradients of the others, adds them in
the order of the ranks, and sends the sum to all: one uneven all-to-all of a layer there, and one back. So the copies
have the same bits, as no sum by parts in an order of each rank's own would promise.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.balance import home_of
from turnout.comm import ExpertGroup, Ledger
from turnout.comm.wire import Flight, Route
from turnout.placement import Placement


def sum_copies(layer: str, grads: Sequence[Tensor], placement: Placement, group: ExpertGroup, ledger: Ledger) -> None:
    """Gradients of a layer's experts with those of their copies, in place; every rank of the group calls it."""
    errand = _Errand.of(placement, group.rank)
    there = splits(errand.leaving, group), splits(errand.coming, group)
    route = Route(
        group=group.whole,
        peers=tuple(range(group.size)),
        rank=group.place,
        rows=there,
        labels=((), ()),
        ledger=ledger,
        layer=layer,
        kind="twins",
    )
    flight = Flight([(rows_of(grad, errand.away), there) for grad in grads], route, "backward")
    sums = [errand.summed(grad, arrived) for grad, arrived in zip(grads, flight.land(), strict=True)]
    back = route.turned()
    flight = Flight([(rows_of(total, errand.wanted), (there[1], there[0])) for total in sums], back, "backward")
    for grad, total, arrived in zip(grads, sums, flight.land(), strict=True):
        grad.index_copy_(0, _index(errand.homed, grad), total)
        grad.index_copy_(0, _index(errand.away, grad), arrived)


def splits(experts: Sequence[Sequence[int]], group: ExpertGroup) -> tuple[int, ...]:
    """Experts for each rank of the whole group: slices are neighbours there, and each goes to its own."""
    slices, at = group.num_slices, group.place % group.num_slices
    return tuple(len(experts[place // slices]) if place % slices == at else 0 for place in range(group.size))


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor."""
    return tensor.index_select(0, _index(rows, tensor))


@dataclass(frozen=True, kw_only=True)
class _Errand:
    """What one rank sends and adds up; experts by number, rows among those that it holds."""

    rank: int
    leaving: list[list[int]]  # to each rank, which adds them up
    coming: list[list[int]]  # from each rank, to be added up here
    sums: tuple[int, ...]  # the experts that are added up here
    homed: tuple[int, ...]  # their rows
    away: tuple[int, ...]  # rows of those that leave, in that order
    wanted: tuple[int, ...]  # of the sums, those that each rank wants in turn

    @classmethod
    def of(cls, placement: Placement, rank: int) -> "_Errand":
        homes = [(expert, home_of(placement, expert)) for expert in placement.copied]
        sums = tuple(expert for expert, home in homes if home == rank)
        mine = placement.experts_of(rank)
        leaving = [[e for e, home in homes if home == to != rank and e in mine] for to in range(placement.ranks)]
        coming = [[e for e in sums if of in placement.ranks_of[e] and of != rank] for of in range(placement.ranks)]
        return cls(
            rank=rank,
            leaving=leaving,
            coming=coming,
            sums=sums,
            homed=tuple(mine.index(expert) for expert in sums),
            away=tuple(mine.index(expert) for expert in itertools.chain(*leaving)),
            wanted=tuple(sums.index(expert) for expert in itertools.chain(*coming)),
        )

    def summed(self, grad: Tensor, arrived: Tensor) -> Tensor:
        """The sums of this rank, each in the order of the ranks that hold a copy."""
        total = grad.new_zeros(len(self.sums), *grad.shape[1:])
        parts = arrived.split([len(experts) for experts in self.coming])
        for rank, (experts, part) in enumerate(zip(self.coming, parts, strict=True)):
            rows = [self.sums.index(expert) for expert in experts]
            if rank == self.rank:
                rows, part = list(range(len(self.sums))), rows_of(grad, self.homed)
            total.index_add_(0, _index(rows, grad), part)
        return total


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    """Row numbers where `like` lies."""
    return torch.tensor(list(rows), dtype=torch.int64, device=like.device)
