"""Quantile balancing: in training, a price for each expert, found from the batch, evens the loads."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, check_choices, check_scale, from_topk, select_topk, sigmoid_shares
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("quantile")
@dataclass(frozen=True, kw_only=True)
class Quantile(RouterConfig):
    """In training the k best of logit less price, in evaluation of the logits alone; the weights know no price.

    The prices are the dual of "each token k experts, each expert k T / E tokens": alternately each token's
    threshold is what its (k + 1)-th expert is worth to it, and each expert's price what its first token beyond
    k T / E would pay. They are found anew in every call, so forward remembers nothing.
    Source: the update of Megatron-Core, https://github.com/NVIDIA/Megatron-LM/pull/5349, which makes one round a
    call and averages prices over calls; that the prices stay within the batch, and `rounds`, are ours.
    """

    k: int = 2  # experts per token
    rounds: int = 8  # rounds of coordinate descent over thresholds and prices
    activation: Literal["softmax", "sigmoid"] = "softmax"  # what turns a logit into a weight
    scale: float = 1.0  # factor on the weights
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        for name in ("k", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"router.{name}={getattr(self, name)} must be at least 1")
        check_scale(self.scale)

    @property
    def choices(self) -> int:
        return self.k

    @property
    def own_balance(self) -> str:
        return "prices by quantile in training"

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return QuantileRouter(dim, num_experts, self)


class QuantileRouter(Router):
    """The module of `Quantile`."""

    def __init__(self, dim: int, num_experts: int, config: Quantile) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(tokens.x_RD)
        wanted_RE = logits_RE.detach()
        if self.training:
            wanted_RE = wanted_RE - quantile_prices(wanted_RE, self.config.k, rounds=self.config.rounds)
        expert_RK = select_topk(wanted_RE, self.config.k)
        is_softmax = self.config.activation == "softmax"
        scores_RE = logits_RE.softmax(dim=1) if is_softmax else sigmoid_shares(logits_RE)
        weight_RK = (scores_RE if is_softmax else logits_RE.sigmoid()).gather(1, expert_RK)
        assignment = from_topk(expert_RK, weight_RK * self.config.scale, tokens, num_experts=self.num_experts)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)


def quantile_prices(scores_RE: Tensor, k: int, *, rounds: int) -> Tensor:
    """Price of each expert, such that top-k of `scores_RE - prices_E` gives each about k R / E tokens.

    Coordinate descent of the dual: threshold_t = (k + 1)-th largest of score - price over experts, then
    price_e = (floor(k R / E) + 1)-th largest of score - threshold over tokens.
    Shapes: scores_RE (R, E), without a gradient; returns (E,), zeros where every token takes every expert.
    """
    num_tokens, num_experts = scores_RE.shape
    prices_E = scores_RE.new_zeros(num_experts)
    if num_tokens == 0 or k == num_experts:
        return prices_E
    fair = k * num_tokens // num_experts
    for _ in range(rounds):
        threshold_R1 = (scores_RE - prices_E).topk(k + 1, dim=1).values[:, -1:]
        prices_E = (scores_RE - threshold_R1).sort(dim=0, descending=True).values[fair]
    return prices_E
