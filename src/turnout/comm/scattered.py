"""A reduce-scatter that sends what a reduce-scatter must, on every backend."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed it
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def reduce_scatter(out: Tensor, sent: Tensor, group: ProcessGroup, op: Any = dist.ReduceOp.SUM) -> None:
    """The ranks' sum of `sent`, of which each gets its run; on GPUs any other operation too.

    Shapes: sent as much as all ranks' `out`, contiguous.
    """
    if sent.device.type != "cpu":
        _reduce_scatter(out, sent, group=group, op=op)
        return
    assert op == dist.ReduceOp.SUM
    # gloo's is an all-reduce, which sends twice as much; so each adds up its own run, in the order of ranks
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    torch.sum(arrived.view(group.size(), *out.shape), dim=0, out=out)
