"""One copy from device to host for all the statistics of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from turnout.errors import ShapeError
from turnout.tensors import MoEStats


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Statistics of B micro-batches in L layers on the host; the experts of all layers stand side by side."""

    num_experts: NDArray[np.int64]  # [L]
    assigned: NDArray[np.int64]  # [B, experts of all layers]
    dropped: NDArray[np.int64]  # [B, experts of all layers], for want of room
    declined: NDArray[np.int64]  # [B, experts of all layers], by the router's design
    num_routed: NDArray[np.int64]  # [B, L] tokens
    entropy_sum: NDArray[np.float64]  # [B, L] nats
    margin_sum: NDArray[np.float64]  # [B, L]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Column of each layer's first expert, as `np.add.reduceat` takes it."""
        return np.cumsum(self.num_experts) - self.num_experts


def take_snapshot(stats: Sequence[MoEStats], num_experts: Sequence[int]) -> Snapshot:
    """The statistics on the host: one per layer, for each micro-batch in turn.

    Raises: ShapeError if they are not a whole number of micro-batches, or a layer's expert count differs.
    """
    num_batches = _num_batches(stats, num_experts)
    num_columns = sum(num_experts)
    kinds = ("assigned_E", "dropped_capacity_E", "dropped_policy_E")
    counts = torch.cat([getattr(s, kind) for kind in kinds for s in stats])
    sums = torch.stack([s.entropy_sum for s in stats] + [s.margin_sum for s in stats]).double()
    # floats travel as the bits of integers, so that counts stay exact and the device is waited for once
    host = torch.cat([counts.long(), sums.detach().view(torch.int64)]).numpy(force=True)
    assigned, dropped, declined = host[: len(counts)].reshape(3, num_batches, num_columns)
    entropy_sum, margin_sum = host[len(counts) :].view(np.float64).reshape(2, num_batches, -1)
    return Snapshot(
        num_experts=np.asarray(num_experts, dtype=np.int64),
        assigned=assigned,
        dropped=dropped,
        declined=declined,
        num_routed=torch.stack([s.num_routed for s in stats]).numpy(force=True).reshape(num_batches, -1),
        entropy_sum=entropy_sum,
        margin_sum=margin_sum,
    )


def _num_batches(stats: Sequence[MoEStats], num_experts: Sequence[int]) -> int:
    num_layers = len(num_experts)
    if not stats or num_layers == 0 or len(stats) % num_layers:
        raise ShapeError(
            f"{len(stats)} statistics for {num_layers} MoE layers; give one per layer, for each micro-batch in turn"
        )
    for index, layer in enumerate(stats):
        expected, found = num_experts[index % num_layers], len(layer.assigned_E)
        if found != expected:
            raise ShapeError(
                f"statistics of layer {index % num_layers} count {found} experts; the recorder expects {expected}"
            )
    return len(stats) // num_layers
