"""LocMoE: top-1 routing by a gate without parameters, whose rows are fixed and orthogonal."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.contracts import Router, RouterConfig
from turnout.routers.affinity_theory import min_capacity
from turnout.routers.grap import block_means, check_blocks, grap_affinity
from turnout.routers.pieces import from_topk, select_topk
from turnout.tensors import MoEStats, RouterInput, RouterOutput


@RouterConfig.TABLE.register("locmoe")
@dataclass(frozen=True, kw_only=True)
class LocMoE(RouterConfig):
    """Each token goes to the expert whose block of features has the highest mean; its weight is the softmax of those.

    The gate learns nothing: the layers below it learn to write an expert's block, through the weight and the losses,
    which in the paper are `load_balance` and `locality`, both of coefficient 0.01. The paper's logits are
    ReLU(w x + eps) with an eps it does not define: it is left out, and the ReLU is a setting, because behind it a token
    whose means are all negative ties and goes to expert 0.
    The lower bound of an expert's capacity (theorem 1, its last form) is evaluated on the first step and kept; delta
    is the mean over tokens of their best affinity, for the reasons given at `locmoe_plus`. A capacity policy with a
    factor has at least that much room.
    Source: Li et al. 2024, arXiv:2401.13920; first batch: Li et al. 2024, arXiv:2406.00023, on LocMoE.
    """

    relu: bool = False  # logits are ReLU(mean), as printed; false: the mean
    floor: Literal["first_step", "none"] = "first_step"  # theorem 1's capacity, measured on that step; none: no floor

    @property
    def choices(self) -> int:
        return 1

    @property
    def needs_whole_layer(self) -> str:
        return "" if self.floor == "none" else "its tokens' affinities, with floor='none' none of it"

    def build(self, dim: int, num_experts: int) -> Router:
        check_blocks(dim, num_experts)
        return LocMoERouter(dim, num_experts, self)


class LocMoERouter(Router):
    """The module of `LocMoE`: owns no parameters, and the capacity that its first step asked for."""

    least_capacity: Tensor  # () int64, rows; 0: not measured yet

    def __init__(self, dim: int, num_experts: int, config: LocMoE) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.register_buffer("least_capacity", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        self.least_capacity.zero_()

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = block_means(tokens.x_RD, self.num_experts)
        if self.config.relu:
            logits_RE = F.relu(logits_RE)
        scores_RE = logits_RE.softmax(dim=1)
        expert_R1 = select_topk(logits_RE, 1)
        assignment = from_topk(expert_R1, scores_RE.gather(1, expert_R1), tokens, num_experts=self.num_experts)
        has_floor = self.config.floor != "none"
        return RouterOutput(
            assignment=replace(assignment, least_capacity=self.least_capacity.clone()) if has_floor else assignment,
            logits_RE=logits_RE,
            scores_RE=scores_RE,
            token_R=tokens.token_R,
            tally=_best_affinities(tokens.x_RD, self.num_experts) if has_floor and self.training else None,
        )

    @torch.no_grad()
    def after_step(self, stats: MoEStats) -> None:
        """Measures the capacity, once."""
        if not stats.tally.numel() or int(stats.num_routed) == 0:
            return
        rows = min_capacity(
            stats.tally.sum() / stats.num_routed,
            dim=self.dim,
            num_experts=self.num_experts,
            num_tokens=int(stats.num_routed),
        )
        self.least_capacity.copy_(torch.where(self.least_capacity == 0, rows, self.least_capacity))


@torch.no_grad()
def _best_affinities(x_RD: Tensor, num_experts: int) -> Tensor:
    """Sum over tokens of their best affinity: ()."""
    affinity_RE = grap_affinity(x_RD, num_experts)
    return affinity_RE.amax(dim=1).sum() if len(x_RD) else x_RD.new_zeros(())
