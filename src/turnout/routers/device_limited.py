"""DeepSeek-V2: a token's experts stand on few devices, so that few messages leave for it."""

from dataclasses import dataclass

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
    within_best_groups,
)
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("device_limited")
@dataclass(frozen=True, kw_only=True)
class DeviceLimited(RouterConfig):
    """The k best experts on the `top_groups` devices whose best expert scores highest; weights of the full softmax.

    DeepSeek-V2 has k=6 of 160 experts, groups=8, top_groups=3; its released code multiplies the weights by 16.
    Source: DeepSeek-AI 2024, arXiv:2405.04434, sections 2.2.1 and 2.2.2.
    """

    k: int = 6  # experts per token
    groups: int = 1  # devices, with equal numbers of neighbouring experts
    top_groups: int = 1  # devices a token reaches
    scale: float = 1.0  # factor on the weights
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"router.k={self.k} must be at least 1")
        if not 1 <= self.top_groups <= self.groups:
            raise ConfigError(f"router.top_groups={self.top_groups} must be from 1 to groups={self.groups}")
        check_scale(self.scale)

    @property
    def choices(self) -> int:
        return self.k

    def remark(self, site: Site) -> str:
        """Groups are devices: one that lies on several takes the limit away."""
        return reach_remark(self.groups, self.top_groups, "ranks", site.spread(self.groups), site.placement.ranks)

    def build(self, dim: int, num_experts: int) -> Router:
        check_reach(self.k, groups=self.groups, top_groups=self.top_groups, num_experts=num_experts)
        return DeviceLimitedRouter(dim, num_experts, self)


class DeviceLimitedRouter(Router):
    """The module of `DeviceLimited`."""

    def __init__(self, dim: int, num_experts: int, config: DeviceLimited) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(tokens.x_RD)
        # logits order experts and devices as their softmax does, also where that underflows
        near_RE = within_best_groups(logits_RE.detach(), self.config.groups, self.config.top_groups, best=1)
        expert_RK = select_topk(near_RE, self.config.k)
        scores_RE = logits_RE.softmax(dim=1)
        assignment = from_topk(
            expert_RK, scores_RE.gather(1, expert_RK) * self.config.scale, tokens, num_experts=self.num_experts
        )
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)
