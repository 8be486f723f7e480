"""Ranks that should hold the same weights do: the bug that makes experts or replicas drift apart shows at once."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from turnout.comm.world import naming
from turnout.errors import TransportError
from turnout.experts.cut import Cut
from turnout.parallel.dense_cuts import DenseCut
from turnout.parallel.layout import Parallel

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(model: nn.Module, parallel: Parallel) -> None:
    """Compare a sum over the bits of every tensor: dense ones over all ranks that have them, parts of others over their
    replicas.

    Every rank calls it. What lies in shards has no other copy than those of whole groups of ranks, which FSDP keeps.
    Raises: TransportError naming the first tensor that differs, on every rank that sees it differ.
    """
    if parallel.world.size == 1:
        return
    shards = parallel.shards.shardings
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel() and name not in shards}
    cuts, tensor, staged = parallel.shards.cuts, parallel.groups.tensor, parallel.groups.stages
    dense = [name for name in tensors if name not in cuts]
    tied = [name for name in dense if name in parallel.shards.tied]
    experts = [name for name in tensors if isinstance(cuts.get(name), Cut)]
    parts = [name for name in tensors if isinstance(cuts.get(name), DenseCut)]
    differing = _differing(dense, tensors, parallel.groups.like) + _differing(
        experts, tensors, parallel.groups.replicas
    )
    differing += _differing(parts, tensors, None if tensor is None else tensor.replicas)
    differing += _differing(tied, tensors, None if staged is None else staged.ends)
    differing += _differing_copies(tensors, parallel)
    if differing:
        raise TransportError(
            f"rank {parallel.world.rank}: {differing[0]} is not the same on all ranks that hold it "
            f"({len(differing)} of {len(tensors)} tensors differ): the model must be equal on all ranks before it is "
            "laid out, and its gradients reduced in every step"
        )


def _differing(names: Sequence[str], tensors: dict[str, Tensor], group: ProcessGroup | None) -> list[str]:
    if group is None or not names:
        return []
    marks = torch.tensor([_mark(tensors[name]) for name in names], dtype=torch.int64)
    # the largest of x and of -x: they belong to one number only if all ranks have it
    extremes = torch.stack([marks, -marks])
    with naming("the comparison of replicas"):
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    differ = extremes[0] != -extremes[1]
    return [name for name, differs in zip(names, differ.tolist(), strict=True) if differs]


def _differing_copies(tensors: dict[str, Tensor], parallel: Parallel) -> list[str]:
    """Those of which an expert is not the same on all ranks of a group that hold it."""
    cuts, group = parallel.shards.of_experts(), parallel.groups.experts
    copied = [(name, expert) for name in cuts for expert in cuts[name].placement.copied]
    if group is None or not copied:
        return []
    at = group.place % group.num_slices
    # what is not here must never be the largest
    marks = torch.full((2, len(copied), group.num_slices), torch.iinfo(torch.int64).min)
    for number, (name, expert) in enumerate(copied):
        held = cuts[name].placement.experts_of(group.rank)
        # of a bias that lies on another slice there are no values
        if expert in held and name in tensors:
            mark = _mark(tensors[name][held.index(expert)])
            marks[:, number, at] = torch.tensor([mark, -mark])
    with naming("the comparison of copies"):
        dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=group.whole)
    differ = (marks[0] != -marks[1]).any(dim=1).tolist()
    return [f"expert {expert} of {name}" for (name, expert), differs in zip(copied, differ, strict=True) if differs]


def _mark(tensor: Tensor) -> int:
    bits = tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    # halves: a sum of 64-bit numbers may wrap round, but wraps alike everywhere
    return int(bits.sum(dtype=torch.int64)) >> 1
