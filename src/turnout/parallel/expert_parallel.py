"""The dispatcher of expert parallelism: rows travel to the ranks of their experts, by an all-to-all program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from turnout.alltoall import Packing, Program, combine, dispatch, steps_of
from turnout.comm import Arrived, ExpertGroup, Ledger, TorchTransport
from turnout.comm.parcels import Parcels
from turnout.comm.picks import Picks, placed, runs, spread
from turnout.comm.sizes import Sizes, agreed_capacity, equal_sizes, exchange_sizes
from turnout.comm.slices import SliceRows
from turnout.contracts import Dispatched, Dispatcher
from turnout.dispatch import by_token, pack, unpack
from turnout.dispatch import combine as combine_rows
from turnout.placement import Placement
from turnout.tensors import Assignment, DispatchPlan, Padded, Ragged, Rows


class ExpertParallel(Dispatcher):
    """One layer's. The sequence of collectives is the same on all ranks, whatever is routed where.

    Where experts are sliced, rows travel to the rank of this slice, then to the other slices of the expert.

    Ragged: counts of rows are exchanged first, with the one copy that the host waits for. Padded, where the backend
    wants blocks and a capacity bounds them: blocks of one size travel, and nothing is waited for; a program that
    merges rows sends them ragged all the same.
    """

    def __init__(
        self, program: Program, group: ExpertGroup, placement: Placement, *, ledger: Ledger, layer: str
    ) -> None:
        """Raises: ConfigError if the program does not deliver."""
        self._program, self._group, self._placement = program, group, placement
        self._ledger, self._layer = ledger, layer
        self._transport = TorchTransport(program, group, ledger, layer)
        packings: list[Packing] = [step.after for step in steps_of(program)]
        self._merged: tuple[Packing, ...] = tuple(
            dict.fromkeys(packing for packing in packings if packing != "assignment")
        )

    def dispatch(
        self,
        x_TD: Tensor,
        assignment: Assignment,
        plan: DispatchPlan,
        *,
        layout: Literal["ragged", "padded"],
        capacity: int | None,
    ) -> Dispatched:
        if layout == "padded" and capacity is not None and not self._merged:
            return self._padded(x_TD, assignment, plan, capacity)
        return self.after_counts(x_TD, assignment, plan, layout)()

    def after_counts(
        self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, layout: Literal["ragged", "padded"]
    ) -> Callable[[], Dispatched]:
        """Exchange the counts now; the rows move when the result is called."""
        sizes = exchange_sizes(
            plan.counts_E,
            self._merged_counts(assignment, plan),
            self._group,
            self._placement,
            ledger=self._ledger,
            layer=self._layer,
        )
        weight_M = assignment.weight_N.index_select(0, plan.assignment_M)
        tokens = Picks(index_M=plan.token_M, num_rows=assignment.num_tokens, one_each=False, known=by_token(plan))
        parcels = self._transport.load(x_TD, sizes, picks=tokens, weight_M=weight_M)
        return lambda: self._ragged(parcels, layout)

    def _ragged(self, parcels: Parcels, layout: Literal["ragged", "padded"]) -> Dispatched:
        arrived = self._transport.arrive(dispatch(self._program, self._transport, parcels))
        slices = self._slices(parcels.sizes, arrived)
        counts = arrived.counts if slices is None else slices.totals
        rows = _laid_out(arrived.x_MD if slices is None else slices.join(arrived.x_MD), counts, layout)
        return Dispatched(rows=rows, combine=lambda out: self._back(arrived, _taken_out(out, counts), slices))

    def _padded(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, capacity: int) -> Dispatched:
        width = agreed_capacity(capacity, self._group, ledger=self._ledger, layer=self._layer)
        sizes = equal_sizes(self._group, self._placement, width)
        blocks = pack(x_TD, plan, layout="padded", capacity=width)
        assert isinstance(blocks, Padded)
        parcels = self._transport.load(blocks.x_LCD.flatten(0, 1), sizes)
        arrived = self._transport.arrive(dispatch(self._program, self._transport, parcels))
        num_local, height = len(arrived.counts), width * self._group.size
        slices = self._slices(sizes, arrived)
        x_MD = arrived.x_MD if slices is None else slices.join(arrived.x_MD)
        x_LCD = x_MD.view(num_local, height, x_TD.shape[1])
        # every row counts: where sources' blocks end nobody knows here, and zeros give rows that are not read
        rows = Padded(x_LCD=x_LCD, counts_L=torch.full((num_local,), height, device=x_TD.device))

        def back(out: Rows) -> Tensor:
            assert isinstance(out, Padded)
            y_MD = self._back(arrived, out.x_LCD.flatten(0, 1), slices)
            home = Padded(x_LCD=y_MD.view(blocks.x_LCD.shape), counts_L=plan.counts_E)
            return combine_rows(unpack(home, plan), assignment, plan)

        return Dispatched(rows=rows, combine=back)

    def _slices(self, sizes: Sizes, arrived: Arrived) -> SliceRows | None:
        group, device = self._group.slices, arrived.x_MD.device
        if group is None:
            return None
        return SliceRows(group=group, counts=sizes.slices, device=device, ledger=self._ledger, layer=self._layer)

    def _back(self, arrived: Arrived, y_ND: Tensor, slices: SliceRows | None) -> Tensor:
        y_MD = y_ND if slices is None else slices.add(y_ND)
        return combine(self._program, self._transport, self._transport.depart(arrived, y_MD)).sums()

    def _merged_counts(self, assignment: Assignment, plan: DispatchPlan) -> Mapping[Packing, Tensor]:
        """This rank's tokens that go to each rank, and to each node, where the program sends them once."""
        if not self._merged:
            return {}
        mesh, num_tokens = self._group.mesh, assignment.num_tokens
        held = [len(self._placement.experts_of(rank)) for rank in range(mesh.size)]
        rank_of_expert_E = spread(range(mesh.size), held, plan.token_M.device)
        rank_M = rank_of_expert_E[assignment.expert_N[plan.assignment_M]]
        goes_PT = torch.zeros(mesh.size * num_tokens, dtype=torch.int64, device=plan.token_M.device)
        goes_PT = goes_PT.index_fill_(0, rank_M * num_tokens + plan.token_M, 1).view(mesh.size, num_tokens)
        counts: dict[Packing, Tensor] = {
            "rank": goes_PT.sum(dim=1),
            "node": goes_PT.view(mesh.nodes, mesh.local, num_tokens).amax(dim=1).sum(dim=1),
        }
        return {packing: counts[packing] for packing in self._merged}


def _laid_out(x_MD: Tensor, counts: Sequence[int], layout: Literal["ragged", "padded"]) -> Rows:
    """The rows as the backend wants them; blocks are as wide as the fullest expert of this rank."""
    counts_L = placed(counts, x_MD.device)
    if layout == "ragged":
        return Ragged(x_MD=x_MD, counts_L=counts_L)
    width, dim = max(counts), x_MD.shape[1]
    empty = x_MD.new_zeros(len(counts) * width, dim)
    filled = empty.index_copy(0, _slots(counts, x_MD.device), x_MD)
    return Padded(x_LCD=filled.view(len(counts), width, dim), counts_L=counts_L)


def _taken_out(out: Rows, counts: Sequence[int]) -> Tensor:
    if isinstance(out, Ragged):
        return out.x_MD
    return out.x_LCD.flatten(0, 1).index_select(0, _slots(counts, out.x_LCD.device))


def _slots(counts: Sequence[int], device: torch.device) -> Tensor:
    width = max(counts)
    return runs([expert * width for expert in range(len(counts))], counts, device)
