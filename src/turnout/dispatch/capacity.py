"""Which assignments are sent: capacity policies, each a row of the table."""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import CapacityPolicy
from turnout.errors import ConfigError
from turnout.tensors import Admission, Assignment


@CapacityPolicy.TABLE.register("none")
@dataclass(frozen=True, kw_only=True)
class Dropless(CapacityPolicy):
    """Every assignment the router does not decline is sent."""

    def admit(self, assignment: Assignment) -> Admission:
        keep_N = None if assignment.declined_N is None else ~assignment.declined_N
        return _admission(assignment, within_N=None, keep_N=keep_N, capacity=None)


@CapacityPolicy.TABLE.register("fixed")
@dataclass(frozen=True, kw_only=True)
class FixedCapacity(CapacityPolicy):
    """An expert takes at most ceil(factor * assignments / experts) rows, first come first served.

    The queue is GShard's: first choices of all tokens in token order, then second choices, and so on; a declined
    choice keeps its place. With K choices a token and no padding that capacity is factor * K * T / E; it is
    computed from routed tokens only, so padding cannot change it.
    Source: Lepikhin et al. 2020, arXiv:2006.16668, section 2.2 and algorithm 1.
    """

    factor: float = 1.25  # capacity over the balanced load
    minimum: int = 1  # least capacity of an expert, in rows
    group_size: int = 0  # neighbouring places of the batch that share a capacity, padding's too; 0: all of them

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ConfigError(
                f"capacity.factor={self.factor} must be a number above 0; for no limit use the policy none"
            )
        if self.minimum < 0 or self.group_size < 0:
            raise ConfigError(f"capacity.minimum={self.minimum} and group_size={self.group_size} must be at least 0")

    def admit(self, assignment: Assignment) -> Admission:
        num_assignments = len(assignment.token_N)
        if self.group_size == 0:
            capacity = self.rows(num_assignments, assignment.num_experts)
            within_N = queue_position(assignment, assignment.expert_N, assignment.num_experts) < capacity
        else:
            within_N = self._within_groups(assignment)
            num_groups = self._num_groups(assignment)
            capacity = min(
                num_assignments,
                self.rows(num_assignments, assignment.num_experts) + num_groups * max(self.minimum, 1),
            )
        keep_N = within_N if assignment.declined_N is None else within_N & ~assignment.declined_N
        return _admission(assignment, within_N=within_N, keep_N=keep_N, capacity=capacity)

    def rows(self, num_assignments: int, num_experts: int) -> int:
        """Capacity of one expert for that many assignments."""
        # a product such as 1.1 * 10 must not be lifted to the next integer by its last bits
        least = self.factor * num_assignments / num_experts * (1 - 4 * sys.float_info.epsilon)
        return max(self.minimum, math.ceil(least))

    def _num_groups(self, assignment: Assignment) -> int:
        return max(1, -(-assignment.num_tokens // self.group_size))

    def _within_groups(self, assignment: Assignment) -> Tensor:
        num_groups, num_experts = self._num_groups(assignment), assignment.num_experts
        group_N = assignment.token_N // self.group_size
        position_N = queue_position(assignment, group_N * num_experts + assignment.expert_N, num_groups * num_experts)
        sizes = torch.bincount(group_N, minlength=num_groups)
        limits = [self.rows(size, num_experts) for size in sizes.tolist()]
        return position_N < torch.tensor(limits, device=position_N.device)[group_N]


def queue_position(assignment: Assignment, queue_N: Tensor, num_queues: int) -> Tensor:
    """Place of each assignment in its queue, counting from 0: by choice, then by token.

    Shapes: queue_N (N,) int64 in [0, num_queues); returns (N,) int64.
    """
    arrival_N = _arrival_order(assignment)
    queue_sorted_N, order_N = queue_N[arrival_N].sort(stable=True)
    start_by_queue = torch.bincount(queue_N, minlength=num_queues).cumsum(0).roll(1)
    start_by_queue[:1] = 0
    place_N = torch.arange(len(queue_N), device=queue_N.device) - start_by_queue[queue_sorted_N]
    return torch.empty_like(queue_N).index_copy_(0, arrival_N[order_N], place_N)


def _arrival_order(assignment: Assignment) -> Tensor:
    num_assignments = len(assignment.token_N)
    index_N = torch.arange(num_assignments, device=assignment.token_N.device)
    if assignment.top_k is not None:
        return index_N.view(-1, assignment.top_k).t().reshape(-1)
    return (assignment.choice_N * assignment.num_tokens + assignment.token_N).argsort(stable=True)


def _admission(
    assignment: Assignment, *, within_N: Tensor | None, keep_N: Tensor | None, capacity: int | None
) -> Admission:
    """A declined choice past the capacity counts as dropped by capacity alone: every drop has one reason."""
    none_E = torch.zeros_like(assignment.counts_E)
    over_E = none_E if within_N is None else _count(assignment, ~within_N)
    declined_E = none_E
    if assignment.declined_N is not None:
        declined_N = assignment.declined_N if within_N is None else assignment.declined_N & within_N
        declined_E = _count(assignment, declined_N)
    return Admission(keep_N=keep_N, capacity=capacity, dropped_E={"capacity": over_E, "policy": declined_E})


def _count(assignment: Assignment, which_N: Tensor) -> Tensor:
    return torch.bincount(assignment.expert_N[which_N], minlength=assignment.num_experts)
