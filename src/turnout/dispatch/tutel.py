"""Tutel's capacity: a factor, as many rows as are needed, or as many as are needed up to a factor."""

import math
from dataclasses import dataclass

import torch

from turnout.contracts import CapacityPolicy, RouterConfig
from turnout.dispatch.admission import MOST_ROWS, admission, factor_of_call, least_rows, rows_needed
from turnout.dispatch.queue import InDecoder, Priority, arrival_order, overtaken_by, queue_position, refuse_in_decoder
from turnout.errors import ConfigError
from turnout.tensors import Admission, Assignment


@CapacityPolicy.TABLE.register("tutel")
@dataclass(frozen=True, kw_only=True)
class TutelCapacity(CapacityPolicy):
    """The rows an expert takes by Tutel's setting x, here `factor`, rounded up to a multiple of `alignment`.

    For T routed tokens of k choices each, s = ceil(T / E): x > 0 gives k * int(x * s); x = 0 the rows of the fullest
    expert, so nothing is dropped; x < 0 the same, but at most k * int(-x * s). Where tokens differ in their number of
    choices, T counts those that have any, k is their mean, and the product is rounded up: x = 1 then has room for a
    balanced load, as it has with k alike (Tutel has no such routers).
    Source: Hwang et al. 2022, arXiv:2206.03382, section 4.1; roundings from extract_critical in
        https://github.com/microsoft/tutel/blob/main/tutel/impls/fast_dispatch.py.
    """

    factor: float = 1.0  # x: above 0 a factor on ceil(T / E); 0: whatever is needed; below 0: what is needed up to -x
    alignment: int = 1  # the capacity is a multiple of this many rows
    priority: Priority = "position"  # whose rows are kept: earlier tokens', higher scores' (Tutel's BPR), or by chance
    in_decoder: InDecoder = "refuse"  # inside a decoder, evaluation in which a token's drops hang on later ones

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ConfigError(
                f"capacity.factor={self.factor} must be a finite number: above 0 a factor, 0 to drop nothing, "
                "below 0 the rows needed up to that factor"
            )
        if self.alignment < 1:
            raise ConfigError(f"capacity.alignment={self.alignment} must be at least 1")

    def check_decoder(self, router: RouterConfig, num_experts: int) -> None:
        """Raises: ConfigError if later tokens push out earlier ones in evaluation, unless `in_decoder` allows it."""
        never = self.factor == 0 or abs(self.factor) >= num_experts
        refuse_in_decoder(
            f"the capacity policy tutel with priority={self.priority!r}",
            self.in_decoder,
            overtaken="" if never else overtaken_by(self.priority, router),
            instead="use capacity.factor=0, which drops nothing",
        )

    def admit(
        self,
        assignment: Assignment,
        *,
        training: bool = True,
        generator: torch.Generator | None = None,
        factor: float | None = None,
    ) -> Admission:
        """A `factor` for this call is an x too, 0 included (released Tutel ignores a 0 passed per call)."""
        del training
        factor = self.factor if factor is None else factor_of_call(factor)
        capacity = -(-self.rows(assignment, factor) // self.alignment) * self.alignment
        if factor == 0:
            return admission(assignment, capacity=capacity)
        arrival_N = arrival_order(assignment, self.priority, generator)
        position_N = queue_position(assignment, assignment.expert_N, assignment.num_experts, arrival_N)
        return admission(assignment, within_N=position_N < capacity, capacity=capacity)

    def rows(self, assignment: Assignment, factor: float) -> int:
        """Rows of one expert for the setting x = `factor`, before alignment."""
        if factor == 0:
            return rows_needed(assignment)
        limit = max(_limit(assignment, abs(factor)), least_rows(assignment))
        return limit if factor > 0 else min(rows_needed(assignment), limit)


def _limit(assignment: Assignment, factor: float) -> int:
    """k * int(factor * ceil(T / E)), with k = N / T."""
    num_assignments = len(assignment.token_N)
    if assignment.top_k is None:
        num_tokens = int((assignment.choice_N == 0).sum())
    else:
        num_tokens = num_assignments // assignment.top_k
    rows_per_choice = int(min(factor * -(-num_tokens // assignment.num_experts), MOST_ROWS))
    return -(-num_assignments * rows_per_choice // max(num_tokens, 1))
