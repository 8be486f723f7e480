"""Which assignments are sent: no limit, or a fixed factor over the balanced load."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import CapacityPolicy, RouterConfig
from turnout.dispatch.admission import admission, factor_of_call, least_rows, rows_needed, rows_of_factor
from turnout.dispatch.queue import InDecoder, Priority, arrival_order, overtaken_by, queue_position, refuse_in_decoder
from turnout.errors import ConfigError
from turnout.tensors import Admission, Assignment


@CapacityPolicy.TABLE.register("none")
@dataclass(frozen=True, kw_only=True)
class Dropless(CapacityPolicy):
    """Every assignment the router does not decline is sent."""

    def admit(
        self,
        assignment: Assignment,
        *,
        training: bool = True,
        generator: torch.Generator | None = None,
        factor: float | None = None,
    ) -> Admission:
        """A `factor` of 0 asks for what this policy does anyway: drop nothing.

        Raises: ConfigError for any other factor.
        """
        del training, generator
        if factor:
            raise ConfigError(
                f"capacity_factor={factor} for one call: the capacity policy none has no factor; "
                "leave it out, pass 0, or use the policy fixed or tutel"
            )
        return admission(assignment)


@CapacityPolicy.TABLE.register("fixed")
@dataclass(frozen=True, kw_only=True)
class FixedCapacity(CapacityPolicy):
    """An expert takes at most ceil(factor * assignments / experts) rows, in the order of its queue.

    By position the queue is GShard's: first choices of all tokens in token order, then second choices, and so on; a
    declined choice keeps its place. With K choices a token and no padding that capacity is factor * K * T / E; it is
    computed from routed tokens only, so padding cannot change it.
    Source: Lepikhin et al. 2020, arXiv:2006.16668, section 2.2 and algorithm 1; priorities: `arrival_order`.
    """

    factor: float = 1.25  # capacity over the balanced load
    minimum: int = 1  # least capacity of an expert, in rows
    group_size: int = 0  # neighbouring places of the batch that share a capacity, padding's too; 0: all of them
    priority: Priority = "position"  # whose rows are kept: earlier tokens', higher scores', or by chance
    eval_factor: float = 0.0  # capacity over the balanced load in evaluation; 0: the same as factor
    in_decoder: InDecoder = "refuse"  # inside a decoder, evaluation in which a token's drops hang on later ones

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ConfigError(
                f"capacity.factor={self.factor} must be a number above 0; for no limit use the policy none"
            )
        if not (self.eval_factor >= 0 and math.isfinite(self.eval_factor)):
            raise ConfigError(
                f"capacity.eval_factor={self.eval_factor} must be a number, at least 0; 0: the same as factor"
            )
        if self.minimum < 0 or self.group_size < 0:
            raise ConfigError(f"capacity.minimum={self.minimum} and group_size={self.group_size} must be at least 0")

    def check_decoder(self, router: RouterConfig, num_experts: int) -> None:
        """Raises: ConfigError if later tokens push out earlier ones in evaluation, unless `in_decoder` allows it."""
        # room for all at one expert drops nothing, and a token that is its own group has no later ones
        never = self._own_factor(training=False) >= num_experts or self.group_size == 1
        refuse_in_decoder(
            f"the capacity policy fixed with priority={self.priority!r}",
            self.in_decoder,
            overtaken="" if never else overtaken_by(self.priority, router),
            instead=f"use the policy none, or capacity.eval_factor={num_experts}, which drops nothing in evaluation",
        )

    def admit(
        self,
        assignment: Assignment,
        *,
        training: bool = True,
        generator: torch.Generator | None = None,
        factor: float | None = None,
    ) -> Admission:
        """For this call a `factor` of 0 drops nothing; -f drops as f does, in blocks no larger than needed (Tutel)."""
        factor = self._own_factor(training) if factor is None else factor_of_call(factor)
        if factor == 0:
            return admission(assignment)
        arrival_N = arrival_order(assignment, self.priority, generator)
        if self.group_size == 0:
            rows = self.rows(len(arrival_N), assignment.num_experts, abs(factor))
            capacity = max(rows, least_rows(assignment))
            within_N = queue_position(assignment, assignment.expert_N, assignment.num_experts, arrival_N) < capacity
        else:
            capacity, within_N = self._by_groups(assignment, arrival_N, abs(factor))
        if factor < 0:
            capacity = min(capacity, rows_needed(assignment))
        return admission(assignment, within_N=within_N, capacity=capacity)

    def rows(self, num_assignments: int, num_experts: int, factor: float | None = None) -> int:
        """Capacity of one expert for that many assignments."""
        factor = self.factor if factor is None else factor
        return max(self.minimum, rows_of_factor(factor, num_assignments, num_experts))

    def _own_factor(self, training: bool) -> float:
        return self.factor if training or self.eval_factor == 0 else self.eval_factor

    def _by_groups(self, assignment: Assignment, arrival_N: Tensor, factor: float) -> tuple[int, Tensor]:
        """Most rows an expert can get from all groups, and which assignments are within their group's capacity."""
        num_experts = assignment.num_experts
        num_groups = max(1, -(-assignment.num_tokens // self.group_size))
        group_N = assignment.token_N // self.group_size
        queue_N = group_N * num_experts + assignment.expert_N
        position_N = queue_position(assignment, queue_N, num_groups * num_experts, arrival_N)
        sizes = torch.bincount(group_N, minlength=num_groups)
        least = least_rows(assignment)
        limits = [max(self.rows(size, num_experts, factor), least) for size in sizes.tolist()]
        within_N = position_N < torch.tensor(limits, device=position_N.device)[group_N]
        rounded_up = self.rows(len(group_N), num_experts, factor)
        rounded_up += num_groups * max(self.minimum, least, 1)
        return min(len(group_N), rounded_up), within_N
