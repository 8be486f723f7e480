"""DeepSeek-V3: sigmoid scores, a bias that balances load without a loss, and a limit on the groups a token reaches."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.placement import Site
from turnout.routers.pieces import (
    LinearScore,
    check_reach,
    check_scale,
    from_topk,
    reach_remark,
    select_topk,
    sigmoid_shares,
    within_best_groups,
)
from turnout.routers.triton_gates import triton_topk
from turnout.tensors import Assignment, MoEStats, RouterInput, RouterOutput


@RouterConfig.TABLE.register("deepseek_v3")
@dataclass(frozen=True, kw_only=True)
class DeepSeekV3(RouterConfig):
    """The experts are chosen by score plus bias, and weighted by the scores alone, which sum to `scale`.

    After each step the bias of an expert with more than the mean load falls, that of one with less rises: by
    `bias_step` whatever the difference is (`sign`, the paper's), or by that much of the difference over the mean
    (`error`), which is fast far from balance and quiet near it.
    Source: DeepSeek-AI 2024, arXiv:2412.19437, eq. 12-16; group score from inference/model.py of
    https://github.com/deepseek-ai/DeepSeek-V3; both updates: Wang et al. 2024, arXiv:2408.15664, section 4.3.
    """

    k: int = 8  # experts per token
    groups: int = 1  # equal groups the experts stand in, as nodes hold them
    top_groups: int = 1  # groups a token reaches: those whose two best scores have the highest sum
    scale: float = 2.5  # sum of a token's weights
    bias_step: float = 0.001  # change of a bias per optimizer step; 0: biases stay
    bias_update: Literal["sign", "error"] = "sign"  # what the change is in proportion to
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ConfigError(
                f"router.k={self.k} must be at least 2: the weight of a single choice is {self.scale} always"
            )
        if not 1 <= self.top_groups <= self.groups:
            raise ConfigError(f"router.top_groups={self.top_groups} must be from 1 to groups={self.groups}")
        if not self.bias_step >= 0:
            raise ConfigError(f"router.bias_step={self.bias_step} must be at least 0")
        check_scale(self.scale)

    @property
    def choices(self) -> int:
        return self.k

    @property
    def own_balance(self) -> str:
        return f"bias of the router x {self.bias_step:g} a step" if self.bias_step else ""

    def remark(self, site: Site) -> str:
        """Groups are nodes: one that lies on several takes the limit away."""
        return reach_remark(self.groups, self.top_groups, "nodes", site.spread(self.groups, site.node_size), site.nodes)

    def build(self, dim: int, num_experts: int) -> Router:
        check_reach(self.k, groups=self.groups, top_groups=self.top_groups, num_experts=num_experts)
        return DeepSeekV3Router(dim, num_experts, self)


class DeepSeekV3Router(Router):
    """The module of `DeepSeekV3`: owns the score's weights, and the biases, which no gradient moves."""

    bias_E: Tensor

    def __init__(self, dim: int, num_experts: int, config: DeepSeekV3) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def reset_parameters(self) -> None:
        """The score resets itself."""
        self.bias_E.zero_()

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(tokens.x_RD)
        assignment, scores_RE = self._one_pass(logits_RE, tokens) or self._choose(logits_RE, tokens)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    def _one_pass(self, logits_RE: Tensor, tokens: RouterInput) -> tuple[Assignment, Tensor] | None:
        """By a kernel, which knows no groups."""
        if self.config.groups != self.config.top_groups:
            return None
        return triton_topk(
            logits_RE,
            tokens,
            self.config.k,
            sigmoid=True,
            renormalize=True,
            scale=self.config.scale,
            bias_E=self.bias_E,
        )

    def _choose(self, logits_RE: Tensor, tokens: RouterInput) -> tuple[Assignment, Tensor]:
        biased_RE = logits_RE.detach().sigmoid() + self.bias_E
        expert_RK = select_topk(
            within_best_groups(biased_RE, self.config.groups, self.config.top_groups), self.config.k
        )
        assignment = from_topk(
            expert_RK,
            sigmoid_shares(logits_RE.gather(1, expert_RK)) * self.config.scale,
            tokens,
            num_experts=self.num_experts,
        )
        return assignment, sigmoid_shares(logits_RE)

    @torch.no_grad()
    def after_step(self, stats: MoEStats) -> None:
        """Biases one step towards balance."""
        load_E = stats.assigned_E.to(self.bias_E.dtype)
        mean = load_E.mean()
        lacking_E = mean - load_E
        share_E = lacking_E / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        self.bias_E.add_(
            lacking_E.sign() if self.config.bias_update == "sign" else share_E, alpha=self.config.bias_step
        )
