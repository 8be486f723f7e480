"""Tensors as parts and as wholes: a checkpoint holds wholes, so that any layout loads what any other saved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from turnout.comm import ExpertGroup, TensorGroup
from turnout.comm.world import naming
from turnout.experts.cut import Cut
from turnout.parallel.dense_cuts import DenseCut
from turnout.parallel.fully_sharded import Sharding


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The parameters of which each rank has a part, by name; so it is with what an optimizer keeps of them.

    Experts are cut over the ranks that share them, attention and dense layers over tensor-parallel ranks; what is left
    of experts, and dense parameters that are not cut, may lie in shards.

    A tensor belongs to a parameter if it has its name, or that name and one more part ("name/exp_avg").
    """

    cuts: Mapping[str, Cut | DenseCut]  # parameter -> which rank has what of it
    group: ExpertGroup | None  # None: no expert is cut
    has_first: bool  # all groups of this rank are those of the job's first rank, which writes checkpoints
    shardings: Mapping[str, Sharding] = field(default_factory=dict)  # parameter -> where FSDP has its shards
    tensor: TensorGroup | None = None  # None: nothing dense is cut

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with the parts gathered, on the CPU; only in the first rank's group, elsewhere as they are.

        Every rank of the job calls it, with the same names in the same order.
        """
        return {name: self._whole(name, tensor) for name, tensor in tensors.items()}

    def mine(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with every whole cut to this rank's part; what has another shape stays as it is."""
        return {name: self._sharded(name, self._cut(name, tensor)) for name, tensor in tensors.items()}

    def parts(self, name: str) -> int:
        """How many parts a parameter has."""
        cut, sharding = self.cuts.get(name), self.shardings.get(name)
        return (1 if cut is None else cut.ranks) * (1 if sharding is None else sharding.shards)

    def whole_shape(self, name: str, shape: list[int]) -> list[int]:
        """The shape of a parameter of which this rank's part has `shape`."""
        return list(self.cuts[name].shape) if name in self.cuts else shape

    def of_experts(self) -> dict[str, Cut]:
        """Those of the cuts that are over expert groups."""
        return {name: cut for name, cut in self.cuts.items() if isinstance(cut, Cut)}

    def gathers(self, name: str) -> bool:
        """Whether `whole` gives this rank all of that parameter."""
        holders = self._holders(name)
        return self.has_first if holders is None else holders.has_first

    def first_expert(self, name: str) -> int:
        """The expert that stands first in this rank's part."""
        holders, sharding = self._holders(name), self.shardings.get(name)
        of_group = 0 if holders is None else holders.cut.first_expert(holders.place)
        return of_group + (0 if sharding is None else sharding.first_row)

    def _holders(self, name: str) -> "_Holders | None":
        cut = self.cuts.get(name) or self.cuts.get(name.rpartition("/")[0])
        if isinstance(cut, DenseCut) and self.tensor is not None:
            return _Holders(cut=cut, place=self.tensor.place, wire=self.tensor.wire)
        if isinstance(cut, Cut) and self.group is not None:
            return _Holders(cut=cut, place=self.group.place, wire=self.group.whole)
        return None

    def _sharded(self, name: str, tensor: Tensor) -> Tensor:
        sharding = self.shardings.get(name) or self.shardings.get(name.rpartition("/")[0])
        return tensor if sharding is None or tensor.ndim == 0 else sharding.shard(tensor)

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        unsharded = _unsharded(tensor)
        return self._gathered(name, unsharded) if self.gathers(name) else tensor

    def _gathered(self, name: str, tensor: Tensor) -> Tensor:
        holders = self._holders(name)
        if holders is None or tensor.shape != holders.cut.part_shape(holders.place):
            return tensor
        return holders.joined(tensor.detach())

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        holders = self._holders(name)
        if holders is None or tensor.shape != holders.cut.shape:
            return tensor
        return holders.cut.part(tensor, holders.place).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, kw_only=True)
class _Holders:
    """The ranks that have the parts of a tensor between them."""

    cut: Cut | DenseCut
    place: int  # this process's
    wire: ProcessGroup

    @property
    def has_first(self) -> bool:
        """Whether the job's first rank is one of them."""
        return 0 in dist.get_process_group_ranks(self.wire)

    def joined(self, part: Tensor) -> Tensor:
        """The whole, on the CPU; all of these ranks call it."""
        shapes = [self.cut.part_shape(rank) for rank in range(self.cut.ranks)]
        # parts differ where ranks do not divide the experts, and biases lie on one slice alone
        block = part.new_zeros(max(math.prod(shape) for shape in shapes))
        block[: part.numel()] = part.reshape(-1)
        blocks = [torch.empty_like(block) for _ in shapes]
        with naming("the gathering of whole tensors"):
            dist.all_gather(blocks, block, group=self.wire)
        parts = [each[: math.prod(shape)].view(shape).cpu() for each, shape in zip(blocks, shapes, strict=True)]
        return self.cut.joined(parts)


def _unsharded(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    # a bias that lies on another slice has no values, and torch gathers no shards of nothing
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    with torch.no_grad():
        return tensor.full_tensor().cpu()
