"""The communication balance loss of DeepSeek-V2: devices receive the same number of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.losses.device_balance import are_devices, check_devices, device_size, sum_by_device
from turnout.placement import Site
from turnout.tensors import Admission, Assignment, LossTerm, RouterOutput


def tokens_by_device(assignment: Assignment, groups: int) -> Tensor:
    """Tokens sent to each device: a token with several experts there is sent once.

    Shapes: returns (groups,) int64.
    Raises: ConfigError unless the devices hold equal numbers of experts.
    """
    device_N = assignment.expert_N // device_size(assignment.num_experts, groups)
    shape = (assignment.num_tokens, groups)
    is_sent = torch.zeros(shape, dtype=torch.bool, device=device_N.device)
    return is_sent.index_put((assignment.token_N, device_N), torch.ones_like(device_N, dtype=torch.bool)).sum(dim=0)


@Loss.TABLE.register("communication_balance")
@dataclass(frozen=True, kw_only=True)
class CommunicationBalance(Loss):
    """sum_i f''_i P''_i over D devices: f''_i = D / (M T) * tokens sent to device i, P''_i the sum of its experts' P_e.

    It is 1 when devices receive alike and every token goes to M of them, less when tokens go to fewer.
    Tokens are counted over the micro-batch: other with more micro-batches or ranks (docs/layers.md).
    Source: DeepSeek-AI 2024, arXiv:2405.04434, eq. 29-31, whose alpha_3 is the coefficient.
    """

    coefficient: float = 0.02  # weight of the term in the total loss
    groups: int = 1  # D, devices with equal numbers of neighbouring experts; at least 2: one alone is always balanced
    top_groups: int = 1  # M, most devices a token is sent to, as the router limits them

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"communication_balance.coefficient={self.coefficient} must be at least 0")
        if not 1 <= self.top_groups <= self.groups:
            raise ConfigError(
                f"communication_balance.top_groups={self.top_groups} must be from 1 to groups={self.groups}"
            )

    def check_own(self, router: RouterConfig, num_experts: int) -> None:
        """Raises: ConfigError if the groups do not divide the experts, or are one: the loss would be a constant."""
        del router
        check_devices("communication_balance", self.groups, num_experts)

    def remark(self, site: Site) -> str:
        """A token is sent once to a rank, so that parts of ranks, and several together, do not count what is sent."""
        if are_devices(self.groups, site):
            return ""
        return (
            f"communication_balance.groups={self.groups} are not the devices of this layout, so that it counts other "
            f"tokens than are sent; groups={site.placement.ranks} are its ranks"
        )

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """Counts a token at every device it chose, dropped there or not.

        Raises: ConfigError if the groups do not divide the experts.
        """
        del admission, sequence_length, step_stats
        num_routed = max(len(routing.token_R), 1)
        score_sums = sum_by_device(routing.scores_RE.sum(dim=0), self.groups)
        sent = tokens_by_device(routing.assignment, self.groups).to(score_sums.dtype)
        load = self.groups / (self.top_groups * num_routed) * sent
        return LossTerm(
            name="communication_balance",
            value=(load * score_sums).sum() / num_routed,
            coefficient=self.coefficient,
            scope="micro_batch",
        )
