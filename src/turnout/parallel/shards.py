"""Expert tensors as slices and as wholes: a checkpoint holds wholes, so that any layout loads what any other saved."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.comm import ExpertGroup
from turnout.placement import Placement


@dataclass(frozen=True, kw_only=True)
class ExpertShards:
    """The parameters that lie in slices along their first axis, by name; so does what an optimizer keeps of them.

    A tensor belongs to a parameter if it has its name, or that name and one more part ("name/exp_avg").
    """

    placements: Mapping[str, Placement]  # parameter -> which rank has which experts
    group: ExpertGroup | None  # None: nothing is cut
    has_first: bool  # the group of the job's first rank, which writes checkpoints

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with every slice gathered, on the CPU; only in the first rank's group, elsewhere as they are.

        Every rank of the group calls it, with the same names in the same order.
        """
        if self.group is None or not self.has_first:
            return dict(tensors)
        return {name: self._gathered(name, tensor) for name, tensor in tensors.items()}

    def mine(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with every whole cut to this rank's experts; what has another number of experts stays as it is."""
        return {name: self._cut(name, tensor) for name, tensor in tensors.items()}

    def whole_shape(self, name: str, shape: list[int]) -> list[int]:
        """The shape of a parameter whose slice has `shape`."""
        return [self.placements[name].num_experts, *shape[1:]] if name in self.placements else shape

    def first_expert(self, name: str) -> int:
        """The expert that stands first in this rank's slice."""
        placement = self._of(name)
        return 0 if placement is None or self.group is None else placement.experts_of(self.group.rank).start

    def total(self, value: float) -> float:
        """A number added up over the group."""
        if self.group is None:
            return value
        number = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(number, group=self.group.whole)
        return float(number)

    def _of(self, name: str) -> Placement | None:
        return self.placements.get(name) or self.placements.get(name.rpartition("/")[0])

    def _gathered(self, name: str, tensor: Tensor) -> Tensor:
        placement = self._of(name)
        if placement is None or self.group is None or tensor.ndim == 0:
            return tensor
        lengths = [len(placement.experts_of(rank)) for rank in range(placement.ranks)]
        most, mine = max(lengths), lengths[self.group.rank]
        block = tensor.new_zeros(most, *tensor.shape[1:])
        block[:mine] = tensor.detach()
        blocks = [torch.empty_like(block) for _ in lengths]
        dist.all_gather(blocks, block, group=self.group.whole)
        return torch.cat([block[:length].cpu() for block, length in zip(blocks, lengths, strict=True)])

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        placement = self._of(name)
        if placement is None or self.group is None or tensor.ndim == 0 or len(tensor) != placement.num_experts:
            return tensor
        mine = placement.experts_of(self.group.rank)
        return tensor[mine.start : mine.stop].clone()
