"""What FSDP hands to its collectives: torch's own gather and sum, noted in the ledger, and named where they fail.

They have the form that FSDPModule.set_custom_all_gather and set_custom_reduce_scatter ask for.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from turnout.comm.ledger import Kind, Ledger, Phase
from turnout.comm.lines import Lines
from turnout.comm.scattered import all_gather_single, reduce_scatter
from turnout.comm.wire import named


class _Shards:
    def __init__(self, ledger: Ledger, module: str, lines: Lines) -> None:
        self._ledger, self._module, self._lines = ledger, module, lines

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for FSDP."""
        return torch.empty(math.prod(size), dtype=dtype, device=device)


class GatherOfShards(_Shards):
    """Weights of a module, before it is used."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> Any:
        """What torch.distributed.all_gather_single gives; nothing where it is done."""
        _note(self._ledger, self._module, "forward", "shards", group, input_tensor.nbytes)
        with named("all-gather of shards", self._module, group, self._ledger):
            if self._lines.carries(input_tensor, group):
                output_tensor.copy_(self._lines.all_gather(input_tensor, group))
                return None
            return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class SumOfShards(_Shards):
    """Gradients of a module, each rank's shard added up."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Done when it returns; the operation is a sum on CPUs, where no other is asked for."""
        _note(self._ledger, self._module, "backward", "shards", group, output_tensor.nbytes)
        with named("reduce-scatter of shards", self._module, group, self._ledger):
            if self._lines.carries(input_tensor, group):
                output_tensor.copy_(self._lines.reduce_scatter(input_tensor, group))
            else:
                reduce_scatter(output_tensor, input_tensor, group, op)


def note_of_copies(ledger: Ledger, module: str, group: ProcessGroup) -> Callable[[Tensor], None]:
    """For FSDP to call with every shard that it has summed over the groups of ranks that have copies of it."""
    return lambda shard: _note(ledger, module, "backward", "copies", group, 2 * shard.nbytes // group.size())


def _note(ledger: Ledger, module: str, phase: Phase, kind: Kind, group: ProcessGroup, each_bytes: int) -> None:
    """So many bytes to each of the others, as a ring or a direct exchange sends them."""
    others = set(range(group.size())) - {dist.get_rank(group)}
    ledger.note(module, phase, kind, dict.fromkeys(others, each_bytes))
