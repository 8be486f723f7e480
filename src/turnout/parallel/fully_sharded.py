"""FSDP2: what data-parallel ranks would all have, they have in shards: weights, gradients and moments (ZeRO-3).

Each block is gathered when it is reached, forward and backward, and its gradients are averaged into shards. Experts of
which several groups of ranks have copies are sharded over those; where every rank has other experts they stay. Beside
tensor parallel the mesh has two axes, and shards lie along that of the data.
Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054; torch.distributed.fsdp.fully_shard.
"""

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from turnout.comm import GatherOfShards, Groups, Ledger, SumOfShards, note_of_copies
from turnout.layers.block import Block
from turnout.layers.moe import MoE
from turnout.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Where the shards of a parameter lie."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    rows: int  # of the whole, which is cut along its first axis
    num_rows: int  # of this rank's shard; none where the whole has no values

    @property
    def shards(self) -> int:
        """How many there are."""
        return self.mesh.size(self._axis)

    @property
    def first_row(self) -> int:
        """The row that stands first in this rank's shard."""
        return self.mesh.get_local_rank(self._axis) * math.ceil(self.rows / self.shards)

    def placed(self, local: Tensor, whole: tuple[int, ...]) -> Tensor:
        """This rank's shard of a tensor of the shape `whole`, as what torch knows to be one; nothing is sent."""
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(whole), stride=stride
        )

    @property
    def _axis(self) -> int:
        return next(axis for axis, placement in enumerate(self.placements) if isinstance(placement, Shard))


def shard_fully(
    model: nn.Module, groups: Groups, strategy: Strategy, cut: Collection[str], ledger: Ledger, device: str
) -> None:
    """Shard a model whose experts are cut; `cut` names those parameters, of which other ranks have the rest.

    Dense weights, or the parts that tensor-parallel ranks have of them, lie in shards over the data axis. Of pipeline
    stages that is of the blocks alone: no pass goes through the model, which would gather what stands beside them.
    """
    # hooks on a view would be lost if it were changed in place, and nothing here is
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    apart: list[nn.Module] = []
    # tensor-parallel ranks have the same experts: those are sharded over all that have them
    has_copies = groups.replicas is not None and (bool(cut) or strategy.tp > 1)
    if has_copies and strategy.zero_size in (0, strategy.dp):
        assert groups.replicas is not None
        mesh = DeviceMesh.from_group(groups.replicas, device)
        apart = [module.experts for module in model.modules() if isinstance(module, MoE)]
        for experts in apart:
            fully_shard(experts, mesh=mesh)
    # experts that are sharded already are passed over by themselves
    alone = set() if apart else {model.get_parameter(name) for name in cut}
    mesh = _dense_mesh(groups, strategy, device)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    staged = groups.stages is not None
    # each block of a stage is for FSDP a model of its own, whose weights it would keep from forward to backward
    for module in blocks if staged else [*blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=alone, reshard_after_forward=True if staged else None)
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            # gloo has no average
            module.set_force_sum_reduction_for_comms(device == "cpu")
            _carry(module, name or "the model", groups, ledger, is_dense=module not in apart)


def _carry(module: FSDPModule, name: str, groups: Groups, ledger: Ledger, *, is_dense: bool) -> None:
    """What FSDP hands to the collectives of a module goes through the ledger, and through memory that ranks share."""
    # what torch asks for is a callable that allocates: its own classes are private
    module.set_custom_all_gather(cast(Any, GatherOfShards(ledger, name, groups.lines)))
    module.set_custom_reduce_scatter(cast(Any, SumOfShards(ledger, name, groups.lines)))
    if is_dense and len(groups.sharded) > 1:
        module.set_all_reduce_hook(note_of_copies(ledger, name, groups.sharded[0]))


def sum_at_end(model: nn.Module, *, is_last: bool, whole: bool) -> None:
    """Before a backward pass: sums over copies of shards wait for the last of a step, and take all of it at once.

    With `whole` the sums into shards wait too, which else every pass makes, and keep whole gradients till then.
    """
    if isinstance(model, FSDPModule) and whole:
        model.set_requires_gradient_sync(is_last)
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def shardings(model: nn.Module) -> dict[str, Sharding]:
    """The parameters that lie in shards, by name."""
    return {
        name: Sharding(
            mesh=parameter.device_mesh,
            placements=tuple(parameter.placements),
            rows=len(parameter),
            num_rows=len(parameter.to_local()),
        )
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward one left gathered; the parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def here(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dense_mesh(groups: Groups, strategy: Strategy, device: str) -> DeviceMesh:
    *copies, shards = groups.sharded
    if not copies:
        return DeviceMesh.from_group(shards, device)
    tp, each = strategy.tp, groups.world.size // strategy.pp
    first = groups.world.rank // each * each
    ranks = torch.arange(first, first + each)[groups.world.rank % tp :: tp].view(-1, shards.size())
    return DeviceMesh.from_group([*copies, shards], device, mesh=ranks, mesh_dim_names=("copies", "shards"))
