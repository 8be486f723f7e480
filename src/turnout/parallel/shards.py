"""Tensors as parts and as wholes: a checkpoint holds wholes, so that any layout loads what any other saved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from turnout.comm import ExpertGroup
from turnout.comm.world import naming
from turnout.errors import CheckpointError
from turnout.experts.cut import Cut
from turnout.parallel.fully_sharded import Sharding
from turnout.parallel.layout import Layout, layout_of


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The parameters of which each rank has a part, by name; so it is with what an optimizer keeps of them.

    Experts are cut over the ranks that share them; what is left of them, and dense parameters, may lie in shards.

    A tensor belongs to a parameter if it has its name, or that name and one more part ("name/exp_avg").
    """

    cuts: Mapping[str, Cut]  # parameter -> which rank has what of it
    group: ExpertGroup | None  # None: nothing is cut
    has_first: bool  # the group of the job's first rank, which writes checkpoints
    shardings: Mapping[str, Sharding] = field(default_factory=dict)  # parameter -> where FSDP has its shards

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with the parts gathered, on the CPU; only in the first rank's group, elsewhere as they are.

        Every rank of the job calls it, with the same names in the same order.
        """
        return {name: self._whole(name, tensor) for name, tensor in tensors.items()}

    def layout(self, name: str, whole: tuple[int, ...]) -> Layout:
        """What of a tensor of the shape `whole` this rank has.

        Raises: CheckpointError if that cannot be the tensor that is cut here.
        """
        cut = self._of(name)
        if cut is not None and len(whole) == len(cut.shape) and whole != tuple(cut.shape):
            # of another number of experts the whole may look like a part of ours
            raise CheckpointError(
                f"{name} is {list(whole)} in the checkpoint, {list(cut.shape)} here; use the recipe of the run that "
                "saved it"
            )
        place = 0 if self.group is None else self.group.place
        return layout_of(whole, cut, place, self._sharding(name))

    def whole_of(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the logical tensor of which this is the part that this rank has."""
        cut = self._of(name)
        if cut is None or self.group is None or tensor.shape != cut.part_shape(self.group.place):
            return tuple(tensor.shape)
        return tuple(cut.shape)

    def parts(self, name: str) -> int:
        """How many parts a parameter has."""
        cut, sharding = self.cuts.get(name), self.shardings.get(name)
        return (1 if cut is None else cut.ranks) * (1 if sharding is None else sharding.shards)

    def whole_shape(self, name: str, shape: list[int]) -> list[int]:
        """The shape of a parameter of which this rank's part has `shape`."""
        return list(self.cuts[name].shape) if name in self.cuts else shape

    def first_expert(self, name: str) -> int:
        """The expert that stands first in this rank's part."""
        cut, sharding = self._of(name), self.shardings.get(name)
        of_group = 0 if cut is None or self.group is None else cut.first_expert(self.group.place)
        return of_group + (0 if sharding is None else sharding.first_row)

    def _of(self, name: str) -> Cut | None:
        return self.cuts.get(name) or self.cuts.get(name.rpartition("/")[0])

    def _sharding(self, name: str) -> Sharding | None:
        return self.shardings.get(name) or self.shardings.get(name.rpartition("/")[0])

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        unsharded = _unsharded(tensor)
        return self._gathered(name, unsharded) if self.has_first else tensor

    def _gathered(self, name: str, tensor: Tensor) -> Tensor:
        cut = self._of(name)
        if cut is None or self.group is None or tensor.shape != cut.part_shape(self.group.place):
            return tensor
        shapes = [cut.part_shape(rank) for rank in range(cut.ranks)]
        # parts differ where ranks do not divide the experts, and biases lie on one slice alone
        block = tensor.new_zeros(max(math.prod(shape) for shape in shapes))
        block[: tensor.numel()] = tensor.detach().reshape(-1)
        blocks = [torch.empty_like(block) for _ in shapes]
        with naming("the gathering of whole tensors"):
            dist.all_gather(blocks, block, group=self.group.whole)
        parts = [each[: math.prod(shape)].view(shape).cpu() for each, shape in zip(blocks, shapes, strict=True)]
        return cut.joined(parts)


def _unsharded(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    # a bias that lies on another slice has no values, and torch gathers no shards of nothing
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    with torch.no_grad():
        return tensor.full_tensor().cpu()
