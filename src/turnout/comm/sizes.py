"""Rows that every rank of an expert group has for every other, on the host: a program's splits follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.alltoall import Block, Packing
from turnout.comm.groups import ExpertGroup
from turnout.comm.ledger import Ledger
from turnout.comm.wire import named
from turnout.placement import Placement
from turnout.topology import Mesh


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts of one call, the same on every rank."""

    mesh: Mesh
    placement: Placement
    experts: Sequence[Sequence[int]]  # [source rank][expert]: assignments
    merged: Mapping[Packing, Sequence[Sequence[int]]]  # [source rank][rank or node]: tokens that go there
    slices: Sequence[Sequence[int]]  # [slice][expert of this rank]: rows that reach it there

    def rows(self, packing: Packing, block: Block) -> int:
        """Rows of a block."""
        source, to = block
        return self._assignments[source][to] if packing == "assignment" else self.merged[packing][source][to]

    def labels(self, packing: Packing, block: Block) -> int:
        """Assignments that the rows of a block stand for."""
        source, to = block
        if packing != "node":
            return self._assignments[source][to]
        return sum(self._assignments[source][to * self.mesh.local : (to + 1) * self.mesh.local])

    @cached_property
    def _assignments(self) -> list[list[int]]:
        spans = [self.placement.slots_of(rank) for rank in range(self.placement.ranks)]
        return [[sum(counts[span.start : span.stop]) for span in spans] for counts in self.experts]


def equal_sizes(group: ExpertGroup, placement: Placement, capacity: int) -> Sizes:
    """Sizes of blocks padded to `capacity` rows for each expert: known to every rank without a message."""
    each, ranks = [capacity] * placement.num_slots, group.mesh.size
    at_slice = [capacity * ranks] * len(placement.slots_of(group.rank))
    slices = [at_slice] * group.num_slices
    return Sizes(mesh=group.mesh, placement=placement, experts=[each] * ranks, merged={}, slices=slices)


def exchange_sizes(
    counts_GE: Tensor,
    merged: Mapping[Packing, Tensor],
    group: ExpertGroup,
    placement: Placement,
    *,
    ledger: Ledger,
    layer: str,
) -> list[Sizes]:
    """Every rank's counts of every chunk, gathered: one small message to each rank, and the one copy the host awaits.

    Those of the other slices come along: the rows that reached them are this rank's too.

    Shapes: counts_GE (chunks, E) this rank's assignments; merged: (chunks, ranks) or (chunks, nodes), its tokens that
    go there.
    """
    counts_GX = torch.cat([counts_GE, *merged.values()], dim=1).to(torch.int64)
    ranks = group.size
    with named("all-gather of counts", layer, group.whole, ledger):
        gathered = group.lines.all_gather(counts_GX, group.whole)
    size = counts_GX.element_size() * counts_GX.numel()
    ledger.note(layer, "forward", "counts", {peer: size for peer in range(ranks) if peer != group.place})
    ledger.note_host_copy(layer)
    by_chunk = gathered.view(ranks, *counts_GX.shape).transpose(0, 1).tolist()
    lengths: dict[Packing, int] = {packing: values.shape[1] for packing, values in merged.items()}
    return [_sizes(rows, counts_GE.shape[1], lengths, group, placement) for rows in by_chunk]


def _sizes(
    rows: list[list[int]], num_experts: int, lengths: Mapping[Packing, int], group: ExpertGroup, placement: Placement
) -> Sizes:
    """Sizes of one chunk from the counts of every rank of `whole`."""
    start, found = num_experts, {}
    for packing, length in lengths.items():
        found[packing] = [row[start : start + length] for row in rows]
        start += length
    by_slice = [[row[:num_experts] for row in rows[at :: group.num_slices]] for at in range(group.num_slices)]
    mine = placement.slots_of(group.rank)
    at_slices = [[sum(row[expert] for row in sources) for expert in mine] for sources in by_slice]
    at = group.place % group.num_slices
    merged_here = {packing: values[at :: group.num_slices] for packing, values in found.items()}
    return Sizes(mesh=group.mesh, placement=placement, experts=by_slice[at], merged=merged_here, slices=at_slices)


def agreed_capacity(capacity: int, group: ExpertGroup, *, ledger: Ledger, layer: str) -> int:
    """The largest capacity of the group, on the host: ranks with fewer tokens may ask for less.

    A number of eight bytes to each rank, by gloo; no device is waited for.
    """
    number = torch.tensor([capacity], dtype=torch.int64)
    with named("capacity", layer, group.whole, ledger):
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group.whole)
    ledger.note(layer, "forward", "counts", {p: 8 for p in range(group.size) if p != group.place})
    return int(number)
