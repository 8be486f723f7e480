"""What all capacity policies share: drops counted by reason, and the rows a factor stands for."""

import math
import sys

import torch
from torch import Tensor

from turnout.config import is_number
from turnout.errors import ConfigError
from turnout.tensors import Admission, Assignment

# beyond any batch, and small enough that no product of it with choices or alignment is beyond 64 bits
MOST_ROWS = 1 << 40


def admission(
    assignment: Assignment,
    *,
    within_N: Tensor | None = None,
    wanted_N: Tensor | None = None,
    capacity: int | None = None,
) -> Admission:
    """Sent is what is within the capacity, wanted by the policy and not declined by the router; None means all are.

    A drop has one reason: `capacity` if it is not within it, else `policy`.
    Shapes: within_N, wanted_N (N,) bool.
    """
    if assignment.declined_N is not None:
        wanted_N = ~assignment.declined_N if wanted_N is None else wanted_N & ~assignment.declined_N
    over_E = refused_E = assignment.expert_N.new_zeros(assignment.num_experts)
    if within_N is not None:
        over_E = _count(assignment, ~within_N)
    if wanted_N is not None:
        refused_E = _count(assignment, ~wanted_N if within_N is None else within_N & ~wanted_N)
    keep_N = wanted_N if within_N is None else within_N if wanted_N is None else within_N & wanted_N
    return Admission(keep_N=keep_N, capacity=capacity, dropped_E={"capacity": over_E, "policy": refused_E})


def rows_of_factor(factor: float, num_assignments: int, num_experts: int) -> int:
    """ceil(factor * assignments / experts), the rows of one expert."""
    # a product such as 1.1 * 10 must not be lifted to the next integer by its last bits
    return math.ceil(min(factor * num_assignments / num_experts * (1 - 4 * sys.float_info.epsilon), MOST_ROWS))


def least_rows(assignment: Assignment) -> int:
    """Rows that the router asks every expert to have room for: a copy to the host where it asks."""
    return 0 if assignment.least_capacity is None else int(assignment.least_capacity)


def rows_needed(assignment: Assignment) -> int:
    """Rows of the fullest expert: a copy to the host.

    Ranks that exchange rows in blocks of one size need the maximum over their group, to be taken here.
    """
    return int(assignment.counts_E.max())


def factor_of_call(factor: float) -> float:
    """The capacity factor a caller asks for.

    Raises: ConfigError if it is not a finite number.
    """
    if not is_number(factor) or not math.isfinite(factor):
        raise ConfigError(
            f"capacity_factor={factor!r} for one call must be a finite number: above 0 a factor, 0 to drop nothing, "
            "below 0 the rows needed up to that factor"
        )
    return factor


def _count(assignment: Assignment, which_N: Tensor) -> Tensor:
    return torch.bincount(assignment.expert_N[which_N], minlength=assignment.num_experts)
