"""Who is kept where not all can be: an expert's best rows, by the share of a sum they carry.

Routers by expert choice and capacities by affinity decide by it; it stands below both.
"""

import torch
from torch import Tensor

# an expert's highest mass in whole units: integers add up exactly, in any order, on any device
UNITS = 2**36
# a share of the sum that is reached but for the rounding to units is reached
SLACK = 1e-9


def keep_best(
    affinity_N: Tensor,
    mass_N: Tensor,
    expert_N: Tensor,
    *,
    num_experts: int,
    threshold: float,
    floor: Tensor | int,
    capacity: int,
) -> Tensor:
    """Which pairs (token, expert) the experts keep: each its highest affinities, of equals the first pair's.

    The number is the fewest whose masses reach `threshold` of the expert's sum, but at least `floor` and at most
    `capacity`; the capacity wins over the floor. An expert whose masses are all 0 keeps the floor.

    Shapes: affinity_N, mass_N (N,), masses at least 0; expert_N (N,) int64; floor (); returns (N,) bool.
    Source: Li et al. 2024 (Expert-Token Resonance), arXiv:2406.00023, the expert choice step. The paper prints
        "Bottom-C" and describes the tokens of highest affinity; it names a threshold on the sum of affinities
        without its rule. Both readings are ours.
    """
    by_affinity_N = affinity_N.argsort(descending=True, stable=True)
    order_N = by_affinity_N[expert_N[by_affinity_N].argsort(stable=True)]
    queue_N = expert_N[order_N]
    edges = torch.searchsorted(queue_N, torch.arange(num_experts + 1, device=queue_N.device))
    unit_N = _units(mass_N, expert_N, num_experts)[order_N]
    # sums over all pairs, of which differences are the sums within an expert
    through = torch.cat([unit_N.new_zeros(1), unit_N.cumsum(0)])
    start_E, end_E = through[edges[:-1]], through[edges[1:]]
    enough_E = (end_E - start_E).double() * (threshold * (1 - SLACK))
    place_N = torch.arange(len(queue_N), device=queue_N.device) - edges[queue_N]
    wanted_N = (through[:-1] - start_E[queue_N] < enough_E[queue_N]) | (place_N < floor)
    return torch.empty_like(wanted_N).index_copy_(0, order_N, wanted_N & (place_N < capacity))


def _units(mass_N: Tensor, expert_N: Tensor, num_experts: int) -> Tensor:
    mass_N = mass_N.double()
    highest_E = mass_N.new_zeros(num_experts).scatter_reduce(0, expert_N, mass_N, reduce="amax")
    return (mass_N / highest_E[expert_N].clamp(min=torch.finfo(mass_N.dtype).tiny) * UNITS).round().long()
