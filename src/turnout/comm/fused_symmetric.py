"""Fused products by torch's symmetric memory: GPUs of a node read each other's rows while they multiply (async TP).

torch's operators are `symm_mem::fused_all_gather_matmul` and `symm_mem::fused_matmul_reduce_scatter`; each rank's rows
are one chunk. Source: https://discuss.pytorch.org/t/distributed-w-torchtitan-introducing-async-tensor-parallelism-in-pytorch/209487.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.comm.fused import FusedProducts
from turnout.comm.groups import TensorGroup
from turnout.comm.ledger import Phase
from turnout.comm.scattered import all_gather_single
from turnout.comm.tensor_wire import TensorWire
from turnout.comm.wire import named
from turnout.comm.world import naming

try:
    # defines the operators; no part of torch's public names yet
    from torch.distributed import _symmetric_memory as symmetric
except ImportError:  # pragma: no cover - a torch without it
    symmetric = None


def why_not(group: TensorGroup, device: torch.device) -> str:
    """Why ranks of this group cannot multiply each other's rows on this device; empty if they can."""
    if device.type != "cuda":
        return f"symmetric memory is of GPUs, and rows are on {device.type}"
    if symmetric is None or not hasattr(torch.ops.symm_mem, "fused_all_gather_matmul"):
        return "this torch has no symm_mem::fused_all_gather_matmul"
    if group.mesh.nodes > 1:
        return f"tp={group.size} reaches over {group.mesh.nodes} nodes, and memory is shared inside one"
    seen = range(torch.cuda.device_count())
    if len(seen) < group.size:
        return f"this process sees {len(seen)} GPUs of the {group.size} of its group: lift CUDA_VISIBLE_DEVICES"
    own = torch.cuda.current_device()
    far = [peer for peer in seen if peer != own and not torch.cuda.can_device_access_peer(own, peer)]
    return f"GPU {own} does not reach the memory of GPUs {far}" if far else ""


def is_shared(group: TensorGroup, device: torch.device) -> bool:
    """Whether all ranks of the group can, and their memory is known to each other now; all of them call it."""
    refused = torch.tensor([int(bool(why_not(group, device)))])
    with naming("an agreement"):
        dist.all_reduce(refused, op=dist.ReduceOp.MAX, group=group.wire)
    if refused.item() or symmetric is None:
        return False
    symmetric.enable_symm_mem_for_group(group.wire.group_name)
    return True


@dataclass(frozen=True, kw_only=True)
class SymmetricProducts(FusedProducts):
    """Ranks have equally many rows."""

    wire: TensorWire

    def gathered(
        self, x_ND: Tensor, matrices: Sequence[Tensor], lengths: tuple[int, ...], phase: Phase, *, keep: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        self.wire.note(phase, x_ND.numel() * x_ND.element_size())
        with self._named("all-gather"):
            kept, outs = torch.ops.symm_mem.fused_all_gather_matmul(
                x_ND.contiguous(), list(matrices), 0, self._name, return_A=keep
            )
        return list(outs), kept

    def scattered(self, parts: Sequence[tuple[Tensor, Tensor]], lengths: tuple[int, ...], phase: Phase) -> Tensor:
        # a sum of products is one of wider matrices
        h = parts[0][0] if len(parts) == 1 else torch.cat([h for h, _ in parts], dim=1)
        matrix = parts[0][1] if len(parts) == 1 else torch.cat([matrix for _, matrix in parts])
        self.wire.note(phase, max(lengths) * matrix.shape[1] * h.element_size())
        with self._named("reduce-scatter"):
            return torch.ops.symm_mem.fused_matmul_reduce_scatter(h.contiguous(), matrix, "sum", 0, self._name)

    def gather(self, x_ND: Tensor, lengths: tuple[int, ...], phase: Phase) -> Callable[[], Tensor]:
        self.wire.note(phase, x_ND.numel() * x_ND.element_size())
        whole = x_ND.new_empty(sum(lengths), x_ND.shape[1])
        work = all_gather_single(whole, x_ND.contiguous(), group=self.wire.group.wire, async_op=True)

        def landed() -> Tensor:
            with self._named("all-gather"):
                assert work is not None
                work.wait()
            return whole

        return landed

    @property
    def _name(self) -> str:
        return self.wire.group.wire.group_name

    def _named(self, collective: str) -> AbstractContextManager[None]:
        return named(collective, self.wire.layer, self.wire.group.wire, self.wire.ledger)
