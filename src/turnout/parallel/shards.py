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
from turnout.errors import CheckpointError
from turnout.experts.cut import Cut
from turnout.parallel.boxes import Layout, layout_of
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
    has_first: bool  # all groups of this rank are those of `first`
    shardings: Mapping[str, Sharding] = field(default_factory=dict)  # parameter -> where FSDP has its shards
    tensor: TensorGroup | None = None  # None: nothing dense is cut
    first: int = 0  # the job's first rank that has the same blocks as this one: where whole tensors are put together
    elsewhere: frozenset[str] = frozenset()  # tensors of other pipeline stages
    tied: frozenset[str] = frozenset()  # parameters that the first stage has and the last

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with the parts gathered, on the CPU; only in the groups of `first`, elsewhere as they are.

        Every rank of the job calls it, with the same names in the same order.
        """
        return {name: self._whole(name, tensor) for name, tensor in tensors.items()}

    def layout(self, name: str, whole: tuple[int, ...]) -> Layout:
        """What of a tensor of the shape `whole` this rank has.

        Raises: CheckpointError if that cannot be the tensor that is cut here.
        """
        cut, holders = self._cut_of(name), self._holders(name)
        if cut is not None and len(whole) == len(cut.shape) and whole != tuple(cut.shape):
            # of another number of experts the whole may look like a part of ours
            raise CheckpointError(
                f"{name} is {list(whole)} in the checkpoint, {list(cut.shape)} here; use the recipe of the run that "
                "saved it"
            )
        return layout_of(whole, cut, 0 if holders is None else holders.place, self._sharding(name))

    def whole_of(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the logical tensor of which this is the part that this rank has."""
        holders = self._holders(name)
        if holders is None or tensor.shape != holders.cut.part_shape(holders.place):
            return tuple(tensor.shape)
        return tuple(holders.cut.shape)

    def is_here(self, name: str) -> bool:
        """Whether this rank has anything of that parameter or buffer, or of what an optimizer keeps of it."""
        return name not in self.elsewhere and name.rpartition("/")[0] not in self.elsewhere

    def parts(self, name: str) -> int:
        """How many parts a parameter has."""
        cut, sharding = self.cuts.get(name), self.shardings.get(name)
        return (1 if cut is None else cut.ranks) * (1 if sharding is None else sharding.shards)

    def holders(self, name: str) -> tuple[int, ...]:
        """How many ranks of a group hold each expert of this rank's part; empty where none has copies."""
        cut = self.cuts.get(name)
        if not isinstance(cut, Cut) or self.group is None or not cut.placement.has_copies:
            return ()
        return tuple(len(cut.placement.ranks_of[expert]) for expert in cut.placement.experts_of(self.group.rank))

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

    def expert_at(self, name: str, row: int) -> int:
        """The expert that stands at a row of this rank's part."""
        holders, sharding = self._holders(name), self.shardings.get(name)
        row += 0 if sharding is None else sharding.first_row
        return row if holders is None else holders.cut.expert_at(holders.place, row)

    def _cut_of(self, name: str) -> Cut | DenseCut | None:
        return self.cuts.get(name) or self.cuts.get(name.rpartition("/")[0])

    def _holders(self, name: str) -> "_Holders | None":
        cut = self._cut_of(name)
        if isinstance(cut, DenseCut) and self.tensor is not None:
            return _Holders(cut=cut, place=self.tensor.place, wire=self.tensor.wire, first=self.first)
        if isinstance(cut, Cut) and self.group is not None:
            return _Holders(cut=cut, place=self.group.place, wire=self.group.whole, first=self.first)
        return None

    def _sharding(self, name: str) -> Sharding | None:
        return self.shardings.get(name) or self.shardings.get(name.rpartition("/")[0])

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        unsharded = _unsharded(tensor)
        return self._gathered(name, unsharded) if self.gathers(name) else tensor

    def _gathered(self, name: str, tensor: Tensor) -> Tensor:
        holders = self._holders(name)
        if holders is None or tensor.shape != holders.cut.part_shape(holders.place):
            return tensor
        return holders.joined(tensor.detach())


@dataclass(frozen=True, kw_only=True)
class _Holders:
    """The ranks that have the parts of a tensor between them."""

    cut: Cut | DenseCut
    place: int  # this process's
    wire: ProcessGroup
    first: int

    @property
    def has_first(self) -> bool:
        """Whether `first` is one of them."""
        return self.first in dist.get_process_group_ranks(self.wire)

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
