"""Token choice: every token takes its k best experts."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import (
    LinearScore,
    check_choices,
    check_scale,
    from_topk,
    normal_draw,
    select_topk,
    sigmoid_shares,
    smooth_load,
)
from turnout.routers.softmax_topk import softmax_topk
from turnout.routers.triton_gates import triton_topk
from turnout.tensors import Assignment, RouterInput, RouterOutput, SoftmaxChoice


@RouterConfig.TABLE.register("topk")
@dataclass(frozen=True, kw_only=True)
class TopK(RouterConfig):
    """Linear top-k routing in its three conventions.

    softmax + renormalize: softmax over the k chosen logits (Shazeer 2017, Mixtral, Qwen3); softmax alone: weights
    of the full softmax (OLMoE, DeepSeek-V1/V2); sigmoid + renormalize: DeepSeek-V3 without its bias.

    A call may ask for any number of choices, 1 to E; one choice renormalised has the weight `scale`, whatever its
    score. Source of this and of `gate_noise`: Hwang et al. 2022 (Tutel), arXiv:2206.03382.
    """

    k: int = 2  # experts per token
    activation: Literal["softmax", "sigmoid"] = "softmax"  # what turns logits into scores
    renormalize: bool = True  # the k weights of a token sum to `scale`
    scale: float = 1.0  # factor on the weights (DeepSeek's route scale)
    bias: bool = False  # the score has a bias per expert (GPT-OSS)
    gate_noise: float = 0.0  # in training, logits get normal noise of deviation gate_noise / num_experts
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"router.k={self.k} must be at least 1")
        if self.k == 1 and self.renormalize:
            raise ConfigError(
                "router.k=1 with renormalize=true gives every token weight 1 and the router no gradient; "
                "set renormalize=false, or use the switch router"
            )
        if not (self.gate_noise >= 0 and math.isfinite(self.gate_noise)):
            raise ConfigError(f"router.gate_noise={self.gate_noise} must be a number of at least 0")
        check_scale(self.scale)

    @property
    def choices(self) -> int:
        return self.k

    @property
    def gives_smooth_load(self) -> bool:
        return self.gate_noise > 0

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return TopKRouter(dim, num_experts, self)


class TopKRouter(Router):
    """The module of `TopK`: owns the score's weights."""

    any_top_k: ClassVar[bool] = True

    def __init__(self, dim: int, num_experts: int, config: TopK) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=config.bias, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        """With noise, weights, scores and losses are those of the noisy logits."""
        clean_RE = logits_RE = self.score(tokens.x_RD)
        if self.training and self.config.gate_noise > 0:
            logits_RE = clean_RE + self._std * normal_draw(clean_RE, tokens.generator)
        assignment, scores_RE = self._choose(logits_RE, tokens)
        return RouterOutput(
            assignment=assignment,
            logits_RE=logits_RE,
            scores_RE=scores_RE,
            token_R=tokens.token_R,
            smooth_load_E=self._smooth_load(clean_RE, logits_RE, assignment) if self.config.gate_noise > 0 else None,
        )

    def softmax_choice(self) -> SoftmaxChoice | None:
        own = self.config
        # a subclass may route as it likes, and a user's score may be anything
        if type(self) is not TopKRouter or type(self.score) is not LinearScore:
            return None
        if own.activation != "softmax" or own.scale != 1 or own.gate_noise > 0:
            return None
        score = self.score
        return SoftmaxChoice(score.weight_ED, score.bias_E, own.k, own.renormalize)

    def _choose(self, logits_RE: Tensor, tokens: RouterInput) -> tuple[Assignment, Tensor]:
        k = self.config.k if tokens.top_k is None else tokens.top_k
        sigmoid, renormalize, scale = self.config.activation == "sigmoid", self.config.renormalize, self.config.scale
        found = None
        if not sigmoid and scale == 1:
            found = softmax_topk(logits_RE, tokens, k, renormalize=renormalize)
        if found is None:
            found = triton_topk(logits_RE, tokens, k, sigmoid=sigmoid, renormalize=renormalize, scale=scale)
        if found is not None:
            return found
        expert_RK = select_topk(logits_RE, k)
        scores_RE, weight_RK = self._weights(logits_RE, expert_RK)
        return from_topk(expert_RK, weight_RK, tokens, num_experts=self.num_experts), scores_RE

    @property
    def _std(self) -> float:
        return self.config.gate_noise / self.num_experts

    def _smooth_load(self, clean_RE: Tensor, noisy_RE: Tensor, assignment: Assignment) -> Tensor:
        """The chance to pass the k-th score again, summed over tokens; the count where no noise is.

        Phi((logit - k-th noisy logit) / deviation): so V-MoE (Riquelme et al. 2021, arXiv:2106.05974, appendix A).
        Tutel's code has the softmax of the logits in place of the first.
        """
        if not self.training:
            return assignment.counts_E.to(clean_RE.dtype)
        kth_R1 = noisy_RE.gather(1, assignment.as_topk()[0][:, -1:])
        return smooth_load(clean_RE, kth_R1, self._std)

    def _weights(self, logits_RE: Tensor, expert_RK: Tensor) -> tuple[Tensor, Tensor]:
        chosen_RK = logits_RE.gather(1, expert_RK)
        if self.config.activation == "softmax":
            scores_RE = logits_RE.softmax(dim=1)
            weight_RK = chosen_RK.softmax(dim=1) if self.config.renormalize else scores_RE.gather(1, expert_RK)
        else:
            scores_RE = sigmoid_shares(logits_RE)
            weight_RK = sigmoid_shares(chosen_RK) if self.config.renormalize else chosen_RK.sigmoid()
        return scores_RE, weight_RK if self.config.scale == 1 else weight_RK * self.config.scale
