"""Switch: one expert a token, weighted by its probability."""

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, from_topk, select_topk
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("switch")
@dataclass(frozen=True, kw_only=True)
class Switch(RouterConfig):
    """Top-1 routing of Switch Transformers; the weight is the full-softmax probability, or there is no gradient.

    Source: Fedus et al. 2021, arXiv:2101.03961.
    """

    jitter: float = 0.0  # in training, logits see x times U(1 - jitter, 1 + jitter); the paper uses 0.01
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"router.jitter={self.jitter} must be in [0, 1)")

    @property
    def choices(self) -> int:
        return 1

    def build(self, dim: int, num_experts: int) -> Router:
        return SwitchRouter(dim, num_experts, self)


class SwitchRouter(Router):
    """The module of `Switch`."""

    def __init__(self, dim: int, num_experts: int, config: Switch) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(self._jittered(tokens.x_RD, tokens.generator))
        scores_RE = logits_RE.softmax(dim=1)
        expert_R1 = select_topk(logits_RE, 1)
        assignment = from_topk(
            expert_R1,
            scores_RE.gather(1, expert_R1),
            tokens,
            num_experts=self.num_experts,
        )
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    def _jittered(self, x_RD: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.config.jitter == 0:
            return x_RD
        noise_RD = torch.rand(x_RD.shape, dtype=x_RD.dtype, device=x_RD.device, generator=generator)
        return x_RD * (1 + self.config.jitter * (2 * noise_RD - 1))
