"""Quantile balancing: in training, a price for each expert, found from the batch, evens the loads."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, check_choices, check_scale, from_topk, select_topk, sigmoid_shares
from turnout.tensors import MoEStats, RouterInput, RouterOutput


@RouterConfig.TABLE.register("quantile")
@dataclass(frozen=True, kw_only=True)
class Quantile(RouterConfig):
    """The k best of logit less the expert's price; the weights know no price.

    The prices are the dual of "each token k experts, each expert k T / E tokens": alternately each token's
    threshold is what its (k + 1)-th expert is worth to it, and each expert's price what its first token beyond
    k T / E would pay. Training fits them to every call, from their average over the steps before; evaluation has that
    average itself, so that no token depends on another.
    Source: the update of Megatron-Core, https://github.com/NVIDIA/Megatron-LM/pull/5349, which makes one round a
    call and routes by the average; that training routes by the batch's own prices, and `rounds`, are ours.
    """

    k: int = 2  # experts per token
    rounds: int = 2  # rounds of coordinate descent over thresholds and prices, a call
    memory: float = 0.9  # share of evaluation's prices that stays from one optimizer step to the next
    activation: Literal["softmax", "sigmoid"] = "softmax"  # what turns a logit into a weight
    scale: float = 1.0  # factor on the weights
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        for name in ("k", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"router.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.memory < 1:
            raise ConfigError(f"router.memory={self.memory} must be at least 0 and below 1")
        check_scale(self.scale)

    @property
    def choices(self) -> int:
        return self.k

    @property
    def own_balance(self) -> str:
        return "prices by quantile in training"

    @property
    def needs_whole_layer(self) -> str:
        return "its calls' prices"

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return QuantileRouter(dim, num_experts, self)


class QuantileRouter(Router):
    """The module of `Quantile`: owns the score's weights, and the average prices, which no gradient moves."""

    price_E: Tensor

    def __init__(self, dim: int, num_experts: int, config: Quantile) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)
        self.register_buffer("price_E", torch.zeros(num_experts))

    def reset_parameters(self) -> None:
        """The score resets itself."""
        self.price_E.zero_()

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(tokens.x_RD)
        price_E = self.price_E.to(logits_RE.dtype)
        if self.training:
            price_E = quantile_prices(logits_RE.detach(), self.config.k, rounds=self.config.rounds, start_E=price_E)
        expert_RK = select_topk(logits_RE.detach() - price_E, self.config.k)
        is_softmax = self.config.activation == "softmax"
        scores_RE = logits_RE.softmax(dim=1) if is_softmax else sigmoid_shares(logits_RE)
        weight_RK = (scores_RE if is_softmax else logits_RE.sigmoid()).gather(1, expert_RK)
        assignment = from_topk(expert_RK, weight_RK * self.config.scale, tokens, num_experts=self.num_experts)
        return RouterOutput(
            assignment=assignment,
            logits_RE=logits_RE,
            scores_RE=scores_RE,
            token_R=tokens.token_R,
            tally=price_E * len(tokens.token_R) if self.training else None,
        )

    @torch.no_grad()
    def after_step(self, stats: MoEStats) -> None:
        """Averages the prices of the step's calls, by their tokens, into those of evaluation."""
        if not stats.tally.numel():
            return
        mean_E = (stats.tally / stats.num_routed.clamp(min=1)).to(self.price_E.dtype)
        # the first step's are taken whole: an average that starts from 0 would hold prices too low for long
        self.price_E.copy_(torch.where(self.price_E.any(), self.price_E.lerp(mean_E, 1 - self.config.memory), mean_E))


def quantile_prices(scores_RE: Tensor, k: int, *, rounds: int, start_E: Tensor | None = None) -> Tensor:
    """Price of each expert, such that top-k of `scores_RE - prices_E` gives each about k R / E tokens.

    Coordinate descent of the dual, from `start_E` (none: zeros): threshold_t = (k + 1)-th largest of score - price over
    experts, then price_e = (floor(k R / E) + 1)-th largest of score - threshold over tokens.
    Shapes: scores_RE (R, E), without a gradient; returns (E,), zeros where every token takes every expert, and
    where there are fewer choices than experts.
    """
    num_tokens, num_experts = scores_RE.shape
    prices_E = scores_RE.new_zeros(num_experts) if start_E is None else start_E
    # fewer choices than experts: a share of none would price every token out of every expert, and leave ties
    fair = k * num_tokens // num_experts
    if fair == 0 or k == num_experts:
        return torch.zeros_like(prices_E)
    for _ in range(rounds):
        threshold_R1 = (scores_RE - prices_E).topk(k + 1, dim=1).values[:, -1:]
        # topk of rows in memory: kthvalue takes twice as long
        worth_ER = (scores_RE - threshold_R1).T.contiguous()
        prices_E = worth_ER.topk(fair + 1, dim=1).values[:, -1]
    return prices_E
