"""Fused products in chunks: collectives of torch.distributed under way while other rows are multiplied.

gloo moves chunks on threads of its own, NCCL on a stream of its own; waiting is then of the host, or of the stream.
Rows that are scattered travel by an all-to-all and are added here: gloo's reduce-scatter is an all-reduce, which sends
twice as much. A ring of single sends was no faster than chunks of an all-gather (docs/LOG.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.comm.cuts import lengths_of
from turnout.comm.fused import FusedProducts
from turnout.comm.ledger import Phase
from turnout.comm.picks import starts
from turnout.comm.scattered import all_gather_single
from turnout.comm.tensor_wire import TensorWire, widened
from turnout.comm.wire import named

Works = list[tuple[int, Tensor, Any]]  # first row of a chunk in every rank's; what arrives; what to wait for


@dataclass(frozen=True, kw_only=True)
class ChunkedProducts(FusedProducts):
    """The rows of every rank in so many chunks."""

    wire: TensorWire
    chunks: int

    def gathered(
        self, x_ND: Tensor, matrices: Sequence[Tensor], lengths: tuple[int, ...], phase: Phase, *, keep: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        coming = self._begin(x_ND, lengths, phase)
        outs = [x_ND.new_empty(sum(lengths), matrix.shape[1]) for matrix in matrices]
        kept = x_ND.new_empty(sum(lengths), x_ND.shape[1]) if keep else None
        own = slice(first := starts(lengths)[self._place], first + len(x_ND))
        for at, rows_ND in ((own, x_ND), *self._others(coming, lengths)):
            for out, matrix in zip(outs, matrices, strict=True):
                torch.mm(rows_ND, matrix, out=out[at])
            if kept is not None:
                kept[at] = rows_ND
        return outs, kept

    def scattered(self, parts: Sequence[tuple[Tensor, Tensor]], lengths: tuple[int, ...], phase: Phase) -> Tensor:
        first, place = starts(lengths), self._place
        others = [rank for rank in range(len(lengths)) if rank != place]
        under_way, at = [], 0
        for width in self._widths(lengths):
            numbers = [min(width, max(0, length - at)) for length in lengths]
            rows = [slice(begin + at, begin + at + number) for begin, number in zip(first, numbers, strict=True)]
            sent = _summed(parts, [rows[rank] for rank in others])
            # what is sent is held on to until it has arrived
            under_way.append((slice(at, at + numbers[place]), sent, *self._exchange(sent, numbers, phase)))
            at += width
        own = _summed(parts, [slice(first[place], first[place] + lengths[place])])
        for rows, _, arrived, work in under_way:
            with named("reduce-scatter", self.wire.layer, self.wire.group.wire, self.wire.ledger):
                work.wait()
            own[rows] += arrived.view(len(others), *own[rows].shape).sum(dim=0)
        return own

    def gather(self, x_ND: Tensor, lengths: tuple[int, ...], phase: Phase) -> Callable[[], Tensor]:
        coming = self._begin(x_ND, lengths, phase)

        def landed() -> Tensor:
            whole = x_ND.new_empty(sum(lengths), x_ND.shape[1])
            first = starts(lengths)[self._place]
            whole[first : first + len(x_ND)] = x_ND
            for at, rows_ND in self._others(coming, lengths):
                whole[at] = rows_ND
            return whole

        return landed

    @property
    def _place(self) -> int:
        return self.wire.group.place

    def _widths(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Of the chunks, by the rank with the most rows."""
        return lengths_of(max(lengths), self.chunks)

    def _begin(self, x_ND: Tensor, lengths: tuple[int, ...], phase: Phase) -> Works:
        """Own rows to all the others, chunk by chunk, in blocks of one size."""
        block = x_ND.contiguous() if len(x_ND) == max(lengths) else widened(x_ND, max(lengths))
        works: Works = []
        at = 0
        for piece in block.split(list(self._widths(lengths))):
            out = piece.new_empty(self.wire.group.size, *piece.shape)
            self.wire.note(phase, piece.numel() * piece.element_size())
            work = all_gather_single(out.flatten(0, 1), piece, group=self.wire.group.wire, async_op=True)
            works.append((at, out, work))
            at += len(piece)
        return works

    def _others(self, coming: Works, lengths: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Where among all rows, and the rows, as they arrive."""
        first = starts(lengths)
        for at, arrived, work in coming:
            with named("all-gather", self.wire.layer, self.wire.group.wire, self.wire.ledger):
                work.wait()
            for rank, rows_ND in enumerate(arrived):
                number = min(len(rows_ND), lengths[rank] - at)
                if rank != self._place and number > 0:
                    yield slice(first[rank] + at, first[rank] + at + number), rows_ND[:number]

    def _exchange(self, sent: Tensor, numbers: Sequence[int], phase: Phase) -> tuple[Tensor, Any]:
        """So many rows to each of the others; what arrives is theirs for the rows here."""
        leaving = [0 if rank == self._place else number for rank, number in enumerate(numbers)]
        awaited = [0 if rank == self._place else numbers[self._place] for rank in range(len(numbers))]
        arrived = sent.new_empty(sum(awaited), sent.shape[1])
        self.wire.note_each(phase, [number * sent.element_size() * sent.shape[1] for number in leaving])
        work = dist.all_to_all_single(arrived, sent, awaited, leaving, group=self.wire.group.wire, async_op=True)
        return arrived, work


def _summed(parts: Sequence[tuple[Tensor, Tensor]], rows: Sequence[slice]) -> Tensor:
    """These rows of the sum of products, one run after another."""
    (h, matrix), *more = parts
    out = h.new_empty(sum(at.stop - at.start for at in rows), matrix.shape[1])
    for at, run in zip(rows, out.split([at.stop - at.start for at in rows]), strict=True):
        torch.mm(h[at], matrix, out=run)
        for other, its_matrix in more:
            run.addmm_(other[at], its_matrix)
    return out
