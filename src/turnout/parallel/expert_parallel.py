"""The dispatcher of expert parallelism: rows travel to the ranks of their experts, by an all-to-all program."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from turnout.alltoall import PROGRAMS, Packing, steps_of
from turnout.balance import dealt
from turnout.comm import Arrived, ExpertGroup, Ledger, TorchTransport
from turnout.comm.cuts import cut_plan, lengths_of
from turnout.comm.parcels import Parcels
from turnout.comm.picks import Picks, placed
from turnout.comm.sizes import Sizes, agreed_capacity, equal_sizes, exchange_sizes
from turnout.comm.slices import SliceRows
from turnout.contracts import Dispatcher, ExpertCall
from turnout.dispatch import LocalDispatcher, by_token, dealt_out, pack, reordered, unpack
from turnout.dispatch import combine as combine_rows
from turnout.experts.cut import Cut
from turnout.parallel.blocks import laid_out, taken_out
from turnout.parallel.gather import WeightGather
from turnout.parallel.pipeline import Way, pipelined
from turnout.strategy import Strategy
from turnout.tensors import Assignment, DispatchPlan, Padded


class ExpertParallel(Dispatcher):
    """One layer's. The sequence of collectives is the same on all ranks, whatever is routed where.

    A call is cut into `strategy.overlap` chunks, and while one computes others are on their way. Where experts are
    sliced, rows travel to the rank of this slice, then to the other parts of the expert; `strategy.adaptive_r` says how
    many parts there are, whose slices gather their weights first. With 0 parts all experts come here, and rows stay.

    Ragged: counts of rows are exchanged first, with the one copy that the host waits for, and chunks are runs of
    tokens. Padded, where the backend wants blocks and a capacity bounds them: blocks of one size travel, chunks are
    parts of that capacity, and nothing is waited for; a program that merges rows sends them ragged all the same, and so
    does any where experts have copies, of which each gets a part of the rows.
    """

    def __init__(
        self,
        strategy: Strategy,
        group: ExpertGroup,
        cuts: Mapping[str, Cut],
        *,
        ledger: Ledger,
        layer: str,
    ) -> None:
        """`cuts`: how the weights of the experts lie on the ranks of the group, by their own names.

        Raises: ConfigError if the program does not deliver.
        """
        program, self._placement = PROGRAMS[strategy.alltoall], next(iter(cuts.values())).placement
        self._group, self._chunks, self._cuts = group, strategy.overlap, cuts
        self._stays, self._sharing = strategy.expert_parts == 0, group.sharings[strategy.expert_parts]
        self._ledger, self._layer = ledger, layer
        self._transport = TorchTransport(program, group, ledger, layer)
        self._steps = steps_of(program)
        packings: list[Packing] = [step.after for step in self._steps]
        self._merged: tuple[Packing, ...] = tuple(
            dict.fromkeys(packing for packing in packings if packing != "assignment")
        )

    def run(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: ExpertCall) -> Tensor:
        experts = self._with_gathered(experts)
        if self._stays:
            return LocalDispatcher().run(x_TD, assignment, plan, experts)
        if self._placement.has_copies:
            plan = self._dealt_out(plan)
        elif self._placement.order:
            plan = reordered(plan, placed(self._placement.order, x_TD.device))
        blocks = experts.layout == "padded" and experts.capacity is not None
        if blocks and not self._merged and not self._placement.has_copies:
            return self._padded(x_TD, assignment, plan, experts)
        return self.after_counts(x_TD, assignment, plan, experts)()

    def after_counts(
        self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: ExpertCall
    ) -> Callable[[], Tensor]:
        """Exchange the counts now; the rows move when the result is called. `plan`: by slots of the placement."""
        cut = cut_plan(plan, assignment.num_tokens, self._chunks)
        sizes = exchange_sizes(
            cut.counts_GE,
            self._merged_counts(assignment.num_tokens, plan, cut.tokens),
            self._group,
            self._placement,
            ledger=self._ledger,
            layer=self._layer,
        )
        rows = [sum(each.experts[self._group.rank]) for each in sizes]
        weight_M = assignment.weight_N.index_select(0, cut.whole.assignment_M)
        pieces = zip(x_TD.split(cut.tokens), cut.plans(rows), weight_M.split(rows), sizes, strict=True)
        parcels = [self._loaded(*piece) for piece in pieces]
        return lambda: _joined(self._pipelined(parcels, experts), dim=0)

    def _dealt_out(self, plan: DispatchPlan) -> DispatchPlan:
        """Every row to one of the copies of its expert."""
        placement, device = self._placement, plan.token_M.device
        deal = dealt(placement, self._group.rank, self._group.mesh.local)
        pieces = placed([deal.slot, deal.expert, deal.first, deal.stride], device)
        return dealt_out(plan, *pieces.unbind(), num_slots=placement.num_slots)

    def _with_gathered(self, experts: ExpertCall) -> ExpertCall:
        """The experts with weights that begin to be gathered now, and that the first computation waits for."""
        peers = self._sharing.weights
        if peers is None:
            return experts
        gather = WeightGather(
            cuts=self._cuts, peers=peers, ledger=self._ledger, layer=self._layer, lines=self._group.lines
        )
        coming = gather.begin(experts.weights)
        gathered = cache(lambda: gather.land(coming))
        return replace(experts, compute=lambda rows, _: experts.compute(rows, gathered()))

    def _loaded(self, x_TD: Tensor, plan: DispatchPlan, weight_M: Tensor, sizes: Sizes) -> Parcels:
        tokens = Picks(index_M=plan.token_M, num_rows=len(x_TD), one_each=False, known=by_token(plan))
        return self._transport.load(x_TD, sizes, picks=tokens, weight_M=weight_M)

    def _pipelined(self, parcels: Sequence[Parcels], experts: ExpertCall) -> list[Tensor]:
        """What each chunk's rows became, at home."""

        def compute_and_return(here: "_Here") -> Way[Tensor]:
            rows = laid_out(here.x_ND, here.counts, experts.layout)
            return self._back(here, taken_out(experts.compute(rows, None), here.counts))

        return pipelined([self._there(each) for each in parcels], compute_and_return)

    def _padded(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: ExpertCall) -> Tensor:
        assert experts.capacity is not None
        width = agreed_capacity(experts.capacity, self._group, ledger=self._ledger, layer=self._layer)
        blocks = pack(x_TD, plan, layout="padded", capacity=width)
        assert isinstance(blocks, Padded)
        widths = lengths_of(width, self._chunks)
        there = [
            self._there(self._transport.load(x_ECD.flatten(0, 1), equal_sizes(self._group, self._placement, each)))
            for x_ECD, each in zip(blocks.x_LCD.split(widths, dim=1), widths, strict=True)
        ]

        def compute_and_return(here: "_Here") -> Way[Tensor]:
            # every row counts: where sources' blocks end nobody knows here, and zeros give rows that are not read
            height, x_ND = here.counts[0], here.x_ND
            counts_L = torch.full((len(here.counts),), height, device=x_ND.device)
            rows = Padded(x_LCD=x_ND.view(len(here.counts), height, x_ND.shape[1]), counts_L=counts_L)
            return self._back(here, experts.compute(rows, None).x.flatten(0, 1))

        home = pipelined(there, compute_and_return)
        num_experts, dim = len(plan.counts_E), x_TD.shape[1]
        parts = [y_MD.view(num_experts, each, dim) for y_MD, each in zip(home, widths, strict=True)]
        rows = Padded(x_LCD=_joined(parts, dim=1), counts_L=plan.counts_E)
        return combine_rows(unpack(rows, plan), assignment, plan)

    def _there(self, parcels: Parcels) -> "Way[_Here]":
        """The way of a chunk to its experts."""
        for step in self._steps:
            parcels = step.play(self._transport, parcels)
            if parcels.arriving is not None:
                yield
        arrived = self._transport.arrive(parcels)
        slices = self._slices(parcels.sizes, arrived)
        if slices is None:
            return _Here(x_ND=arrived.x_MD, counts=arrived.counts, arrived=arrived, slices=None)
        sent = slices.join(arrived.x_MD)
        yield
        return _Here(x_ND=slices.joined(sent), counts=tuple(slices.totals), arrived=arrived, slices=slices)

    def _back(self, here: "_Here", y_ND: Tensor) -> Way[Tensor]:
        """The way of what the experts made of a chunk."""
        if here.slices is not None:
            sent = here.slices.add(y_ND)
            yield
            y_ND = here.slices.added(sent)
        parcels = self._transport.depart(here.arrived, y_ND)
        for step in reversed(self._steps):
            parcels = step.play_back(self._transport, parcels)
            if step.verb == "exchange" and parcels.arriving is not None:
                yield
        return parcels.landed().sums()

    def _slices(self, sizes: Sizes, arrived: Arrived) -> SliceRows | None:
        peers, device = self._sharing.rows, arrived.x_MD.device
        if peers is None:
            return None
        counts = [sizes.slices[place % self._group.num_slices] for place in peers.places]
        return SliceRows(
            peers=peers, counts=counts, device=device, ledger=self._ledger, layer=self._layer, lines=self._group.lines
        )

    def _merged_counts(self, num_tokens: int, plan: DispatchPlan, tokens: Sequence[int]) -> Mapping[Packing, Tensor]:
        """Tokens of each chunk that go to each rank, and to each node, where the program sends them once."""
        if not self._merged:
            return {}
        mesh = self._group.mesh
        rank_S = placed(self._placement.rank_at, plan.token_M.device)
        rank_M = rank_S.repeat_interleave(plan.counts_E, output_size=len(plan.token_M))
        goes_PT = torch.zeros(mesh.size * num_tokens, dtype=torch.int64, device=plan.token_M.device)
        goes_PT = goes_PT.index_fill_(0, rank_M * num_tokens + plan.token_M, 1).view(mesh.size, num_tokens)
        goes: dict[Packing, Tensor] = {
            "rank": goes_PT,
            "node": goes_PT.view(mesh.nodes, mesh.local, num_tokens).amax(dim=1),
        }
        return {
            packing: torch.stack([part.sum(dim=1) for part in goes[packing].split(list(tokens), dim=1)])
            for packing in self._merged
        }


@dataclass(frozen=True, kw_only=True)
class _Here:
    """A chunk at its experts."""

    x_ND: Tensor  # by expert
    counts: tuple[int, ...]  # rows of each expert
    arrived: Arrived
    slices: SliceRows | None


def _joined(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
