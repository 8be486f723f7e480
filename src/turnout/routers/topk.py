"""Token choice: every token takes its k best experts."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, from_topk, select_topk, sigmoid_shares
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("topk")
@dataclass(frozen=True, kw_only=True)
class TopK(RouterConfig):
    """Linear top-k routing in its three conventions.

    softmax + renormalize: softmax over the k chosen logits (Shazeer 2017, Mixtral, Qwen3); softmax alone: weights
    of the full softmax (OLMoE, DeepSeek-V1/V2); sigmoid + renormalize: DeepSeek-V3 without its bias.
    """

    k: int = 2  # experts per token
    activation: Literal["softmax", "sigmoid"] = "softmax"  # what turns logits into scores
    renormalize: bool = True  # the k weights of a token sum to `scale`
    scale: float = 1.0  # factor on the weights (DeepSeek's route scale)
    bias: bool = False  # the score has a bias per expert (GPT-OSS)
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"router.k={self.k} must be at least 1")
        if self.k == 1 and self.renormalize:
            raise ConfigError(
                "router.k=1 with renormalize=true gives every token weight 1 and the router no gradient; "
                "set renormalize=false, or use the switch router"
            )

    @property
    def choices(self) -> int:
        return self.k

    def build(self, dim: int, num_experts: int) -> Router:
        if self.k > num_experts:
            raise ConfigError(f"router.k={self.k} is more than num_experts={num_experts}; legal: 1 to {num_experts}")
        return TopKRouter(dim, num_experts, self)


class TopKRouter(Router):
    """The module of `TopK`: owns the score's weights."""

    def __init__(self, dim: int, num_experts: int, config: TopK) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=config.bias, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(tokens.x_RD)
        expert_RK = select_topk(logits_RE, self.config.k)
        scores_RE, weight_RK = self._weights(logits_RE, expert_RK)
        assignment = from_topk(expert_RK, weight_RK, tokens, num_experts=self.num_experts)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    def _weights(self, logits_RE: Tensor, expert_RK: Tensor) -> tuple[Tensor, Tensor]:
        chosen_RK = logits_RE.gather(1, expert_RK)
        if self.config.activation == "softmax":
            scores_RE = logits_RE.softmax(dim=1)
            weight_RK = chosen_RK.softmax(dim=1) if self.config.renormalize else scores_RE.gather(1, expert_RK)
        else:
            scores_RE = sigmoid_shares(logits_RE)
            weight_RK = sigmoid_shares(chosen_RK) if self.config.renormalize else chosen_RK.sigmoid()
        return scores_RE, weight_RK * self.config.scale
