"""A capacity that follows the affinities: each expert keeps as many of its best rows as carry most of its affinity."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import CapacityPolicy
from turnout.dispatch.admission import admission, factor_of_call, rows_needed, rows_of_factor
from turnout.dispatch.queue import order_by_priority, priorities, queue_position
from turnout.errors import ConfigError
from turnout.tensors import Admission, Assignment

# the expert's highest affinity in whole units: integers add up exactly, in any order, on any device
UNITS = 2**40


@CapacityPolicy.TABLE.register("affinity")
@dataclass(frozen=True, kw_only=True)
class AffinityThreshold(CapacityPolicy):
    """An expert keeps its best rows until they carry the share `threshold` of the affinity of all that chose it.

    Affinity is the router's priority (the weights where it gives none), negative ones counted as 0. At least `minimum`
    rows are kept where so many came, and at most max(minimum, ceil(factor * assignments / experts)). A row is dropped
    for `capacity` if the threshold would have kept it, else for `policy`.

    The paper keeps a number "determined by a threshold of the sum of affinity scores" and gives no rule: the shortest
    prefix is our reading, and 0.75 our default. Remark 7's lower bound, which moves with the data, is the locmoe_plus
    router's to apply; here it is a constant.
    Source: Li et al. 2024, arXiv:2406.00023, section on the adaptive threshold; factor 1.1: the buffer of its baseline.
    """

    threshold: float = 0.75  # share of an expert's affinity to keep; 1: every row with affinity above 0
    minimum: int = 1  # least rows an expert keeps, where so many chose it
    factor: float = 1.1  # most rows over the balanced load; 0: no limit

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"capacity.threshold={self.threshold} must be above 0 and at most 1")
        if self.minimum < 0:
            raise ConfigError(f"capacity.minimum={self.minimum} must be at least 0")
        if not (self.factor >= 0 and math.isfinite(self.factor)):
            raise ConfigError(f"capacity.factor={self.factor} must be a number, at least 0; 0: no limit")

    def admit(
        self,
        assignment: Assignment,
        *,
        training: bool = True,
        generator: torch.Generator | None = None,
        factor: float | None = None,
    ) -> Admission:
        """For this call a `factor` of 0 drops by the threshold alone; -f limits as f, in blocks as small as can be."""
        del training, generator
        factor = self.factor if factor is None else factor_of_call(factor)
        place_N = queue_position(
            assignment, assignment.expert_N, assignment.num_experts, arrival_N=order_by_priority(assignment)
        )
        wanted_N = self._short_of_threshold(assignment, place_N) | (place_N < self.minimum)
        if factor == 0:
            return admission(assignment, wanted_N=wanted_N)
        capacity = max(self.minimum, rows_of_factor(abs(factor), len(place_N), assignment.num_experts))
        if factor < 0:
            capacity = min(capacity, rows_needed(assignment))
        return admission(assignment, within_N=(place_N < capacity) | ~wanted_N, wanted_N=wanted_N, capacity=capacity)

    def _short_of_threshold(self, assignment: Assignment, place_N: Tensor) -> Tensor:
        """Whether the rows before each one in its expert's queue do not yet reach the threshold."""
        expert_N = assignment.expert_N
        unit_N = affinity_units(priorities(assignment), expert_N, assignment.num_experts)
        total_E = torch.zeros_like(assignment.counts_E).index_add(0, expert_N, unit_N)
        row_N = (assignment.counts_E.cumsum(0) - assignment.counts_E)[expert_N] + place_N
        queued_N = torch.empty_like(unit_N).index_copy_(0, row_N, unit_N)
        ahead_N = (queued_N.cumsum(0) - queued_N)[row_N] - (total_E.cumsum(0) - total_E)[expert_N]
        # a sum that falls short by rounding alone has reached the threshold
        return ahead_N < self.threshold * (1 - 1e-9) * total_E[expert_N].double()


def affinity_units(affinity_N: Tensor, expert_N: Tensor, num_experts: int) -> Tensor:
    """Affinities, 0 for negative ones, in units of the expert's highest: that is `UNITS`.

    Shapes: affinity_N, expert_N (N,); returns (N,) int64.
    """
    affinity_N = affinity_N.double().clamp(min=0)
    highest_E = affinity_N.new_zeros(num_experts).scatter_reduce(0, expert_N, affinity_N, reduce="amax")
    tiny = torch.finfo(affinity_N.dtype).tiny
    return (affinity_N / highest_E[expert_N].clamp(min=tiny) * UNITS).round().long()
