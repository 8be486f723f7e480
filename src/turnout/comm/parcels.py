"""What the torch.distributed transport passes from verb to verb: rows in hand, how they lie, and the way back."""

from dataclasses import dataclass, replace

from torch import Tensor

from turnout.alltoall import Block, Packing
from turnout.comm.picks import Picks, runs, spread, starts
from turnout.comm.sizes import Sizes
from turnout.comm.wire import Route, SentLabelled, SentRows
from turnout.segments import gather, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The assignments of merged rows, block by block and in each in the order of the source's assignments."""

    row_J: Tensor  # which row of its block an assignment takes
    weight_J: Tensor


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One exchange, for the way back; None for a route: nobody else was reached."""

    picks: Picks | None
    weight_M: Tensor | None
    route: Route | None


@dataclass(frozen=True, kw_only=True)
class Parcels:
    """On the way to the experts row m is x[picks[m]]; on the way back it is a weighted sum of the rows of x.

    The blocks are those of the itinerary, so their sizes, and all splits, follow from `sizes`.
    """

    x_ND: Tensor
    sizes: Sizes
    blocks: tuple[Block, ...]
    packing: Packing = "assignment"
    picks: Picks | None = None  # None: the rows of x as they are
    weight_M: Tensor | None = None  # of each row, to be applied on the way back
    labels: Labels | None = None  # of merged rows
    trail: tuple[Sent, ...] = ()  # exchanges so far
    step: int = 0  # verbs so far
    arriving: SentRows | SentLabelled | None = None  # what x and labels wait for; x is empty until then

    def landed(self) -> "Parcels":
        """The same, once what was sent has arrived: the verb after an exchange waits for it, and no one before."""
        if self.arriving is None:
            return self
        if isinstance(self.arriving, SentRows):
            return replace(self, x_ND=self.arriving.land(), arriving=None)
        rows, weight_J, row_J = self.arriving.land()
        return replace(self, x_ND=rows, labels=Labels(row_J=row_J, weight_J=weight_J), arriving=None)

    def row_sizes(self, blocks: tuple[Block, ...] | None = None) -> list[int]:
        """Rows of each block."""
        return [self.sizes.rows(self.packing, block) for block in (self.blocks if blocks is None else blocks)]

    def label_sizes(self, blocks: tuple[Block, ...] | None = None) -> list[int]:
        """Labels of each block."""
        return [self.sizes.labels(self.packing, block) for block in (self.blocks if blocks is None else blocks)]

    def picked(self, later: Picks) -> "Parcels":
        """The rows picked once more; weights of rows go along."""
        weight_M = None if self.weight_M is None else self.weight_M.index_select(0, later.index_M)
        return replace(self, picks=later if self.picks is None else self.picks.then(later), weight_M=weight_M)

    def ordered(self, blocks: tuple[Block, ...]) -> "Parcels":
        """The same blocks in another order, their labels with them."""
        if blocks == self.blocks:
            return self
        moved = self.picked(self._order(self.row_sizes(), blocks))
        if self.labels is None:
            return replace(moved, blocks=blocks)
        by_label = self._order(self.label_sizes(), blocks).index_M
        labels = Labels(
            row_J=self.labels.row_J.index_select(0, by_label), weight_J=self.labels.weight_J.index_select(0, by_label)
        )
        return replace(moved, blocks=blocks, labels=labels)

    def label_rows(self) -> Tensor:
        """The row of every label among all rows in hand. Shapes: returns (J,)."""
        assert self.labels is not None
        sizes = self.label_sizes()
        return self.labels.row_J + spread(starts(self.row_sizes()), sizes, self.labels.row_J.device)

    def rows(self) -> Tensor:
        """The rows themselves."""
        return self.x_ND if self.picks is None else gather(self.x_ND, self.picks.segments)

    def sums(self) -> Tensor:
        """On the way back: what was one row before, from the rows it became."""
        if self.picks is not None:
            return weighted_sum(self.x_ND, self.weight_M, self.picks.segments)
        return self.x_ND if self.weight_M is None else self.x_ND * self.weight_M.unsqueeze(1).to(self.x_ND.dtype)

    def _order(self, sizes: list[int], blocks: tuple[Block, ...]) -> Picks:
        begin = dict(zip(self.blocks, starts(sizes), strict=True))
        length = dict(zip(self.blocks, sizes, strict=True))
        index_M = runs([begin[b] for b in blocks], [length[b] for b in blocks], self.x_ND.device)
        return Picks(index_M=index_M, num_rows=sum(sizes), one_each=True)
