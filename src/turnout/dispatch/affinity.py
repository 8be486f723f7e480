"""A capacity that follows the affinities: each expert keeps as many of its best rows as carry most of its affinity."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import CapacityPolicy, RouterConfig
from turnout.dispatch.admission import admission, factor_of_call, least_rows, rows_needed, rows_of_factor
from turnout.dispatch.queue import (
    InDecoder,
    arrival_order,
    order_by_priority,
    priorities,
    queue_position,
    refuse_in_decoder,
)
from turnout.errors import ConfigError
from turnout.ranking import keep_best
from turnout.tensors import Admission, Assignment


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
    in_decoder: InDecoder = "refuse"  # inside a decoder, evaluation in which a token's drops hang on later ones

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"capacity.threshold={self.threshold} must be above 0 and at most 1")
        if self.minimum < 0:
            raise ConfigError(f"capacity.minimum={self.minimum} must be at least 0")
        if not (self.factor >= 0 and math.isfinite(self.factor)):
            raise ConfigError(f"capacity.factor={self.factor} must be a number, at least 0; 0: no limit")

    def check_decoder(self, router: RouterConfig, num_experts: int) -> None:
        """Raises: ConfigError unless `in_decoder` allows it."""
        del router, num_experts
        refuse_in_decoder(
            "the capacity policy affinity",
            self.in_decoder,
            overtaken="rows of higher affinity",
            instead="use the policy none",
        )

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
        minimum = max(self.minimum, least_rows(assignment))
        wanted_N = self._carriers(assignment, minimum)
        if factor == 0:
            return admission(assignment, wanted_N=wanted_N)
        place_N = queue_position(
            assignment, assignment.expert_N, assignment.num_experts, arrival_N=order_by_priority(assignment)
        )
        capacity = max(minimum, rows_of_factor(abs(factor), len(place_N), assignment.num_experts))
        if factor < 0:
            capacity = min(capacity, rows_needed(assignment))
        return admission(assignment, within_N=(place_N < capacity) | ~wanted_N, wanted_N=wanted_N, capacity=capacity)

    def _carriers(self, assignment: Assignment, minimum: int) -> Tensor:
        """Whether a row is one of the best that carry the threshold; of equals the earlier arrival is the better."""
        arrival_N = arrival_order(assignment)
        affinity_N = priorities(assignment)[arrival_N]
        kept_N = keep_best(
            affinity_N,
            affinity_N.clamp(min=0),
            assignment.expert_N[arrival_N],
            num_experts=assignment.num_experts,
            threshold=self.threshold,
            floor=minimum,
            capacity=len(arrival_N),
        )
        return torch.empty_like(kept_N).index_copy_(0, arrival_N, kept_N)
