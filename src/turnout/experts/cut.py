"""How a tensor of experts lies on ranks: experts by place, and the hidden width of each expert by slice."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.placement import Placement, Run


@dataclass(frozen=True, kw_only=True)
class Block:
    """A box of a whole tensor that is a box of a rank's part as well."""

    whole_at: tuple[int, ...]  # its first index in the whole
    part_at: tuple[int, ...]  # the same in the part
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One [E, ...] tensor on `slices` times as many ranks as have experts of their own; neighbours slice the same ones.

    Rank r has slice r % slices of the experts at place r // slices.
    Source: Rajbhandari et al. 2022, DeepSpeed-MoE, arXiv:2201.05596, section 5.1.2 (expert slicing).
    """

    shape: tuple[int, ...]  # of the whole
    placement: Placement
    slices: int = 1  # ranks that share an expert's hidden width
    axis: int = 0  # that of the hidden width; 0: there is none, and the first slice has it all
    halves: int = 1  # 2: gate and up lie side by side, and each is cut

    @property
    def ranks(self) -> int:
        return self.placement.ranks * self.slices

    def expert_at(self, rank: int, row: int) -> int:
        """The expert that stands at a row of a rank's part."""
        return self.placement.experts_of(rank // self.slices)[row]

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """What a rank has of it. Shapes: whole (E, ...); returns its experts, its slice of their hidden width."""
        place, at = divmod(rank, self.slices)
        runs = [whole[run.expert : run.expert + run.length] for run in self.placement.runs_of(place)]
        rows = runs[0] if len(runs) == 1 else torch.cat(runs)
        if self.slices == 1:
            return rows
        if self.axis == 0:
            return rows if at == 0 else rows[..., :0]
        by_half = rows.unflatten(self.axis, (self.halves, self.slices, -1))
        return by_half.select(self.axis + 1, at).flatten(self.axis, self.axis + 1)

    def blocks(self, rank: int) -> tuple[Block, ...]:
        """The boxes of the whole of which `part` consists; none where it has no values."""
        place, at = divmod(rank, self.slices)
        return tuple(block for run in self.placement.runs_of(place) for block in self._blocks(run, at))

    def part_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of `part`."""
        return tuple(self.part(torch.empty(self.shape, device="meta"), rank).shape)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from the parts of all ranks, in their order."""
        places = [self._experts(parts[start : start + self.slices]) for start in range(0, self.ranks, self.slices)]
        return torch.cat([places[run.rank][run.row : run.row + run.length] for run in self.placement.runs])

    def merged(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from all parts, or from those of neighbouring slices of the same experts a wider slice."""
        return self.joined(parts) if len(parts) == self.ranks else self._experts(parts)

    def _blocks(self, run: Run, at: int) -> tuple[Block, ...]:
        """The boxes of a run of experts, in slice number `at` of them."""
        sizes, start = [run.length, *self.shape[1:]], [run.expert] + [0] * (len(self.shape) - 1)
        if self.slices == 1 or self.axis == 0:
            begin = (run.row,) + (0,) * (len(sizes) - 1)
            return (Block(whole_at=tuple(start), part_at=begin, sizes=tuple(sizes)),) if at == 0 else ()
        half = self.shape[self.axis] // self.halves
        width = half // self.slices
        sizes[self.axis] = width

        def block(number: int) -> Block:
            whole_at, part_at = list(start), [run.row] + [0] * (len(sizes) - 1)
            whole_at[self.axis], part_at[self.axis] = number * half + at * width, number * width
            return Block(whole_at=tuple(whole_at), part_at=tuple(part_at), sizes=tuple(sizes))

        return tuple(block(number) for number in range(self.halves))

    def _experts(self, parts: Sequence[Tensor]) -> Tensor:
        if self.slices == 1 or self.axis == 0:
            return parts[0]
        by_half = [part.unflatten(self.axis, (self.halves, -1)) for part in parts]
        return torch.cat(by_half, dim=self.axis + 1).flatten(self.axis, self.axis + 1)
