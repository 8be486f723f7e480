"""Forced load: tokens dealt to experts by their place in the batch, for benchmarks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import check_choices, check_scale, from_topk
from turnout.tensors import RouterInput, RouterOutput

# its multiples, modulo 1, cover any interval more evenly than those of any other number
GOLDEN = (math.sqrt(5) - 1) / 2


@RouterConfig.TABLE.register("forced")
@dataclass(frozen=True, kw_only=True)
class Forced(RouterConfig):
    """Every expert gets the same number of choices, give or take one, whatever the tokens are; each weighs scale / k.

    With a `skew`, expert e's load falls as 1 / (e + 1)^skew instead, up to all tokens, as Zipf's law has it: an
    imbalance that is the same in every run. No parameters; a model with it learns nothing about routing.
    """

    k: int = 2  # experts per token
    scale: float = 1.0  # sum of a token's weights
    skew: float = 0.0  # exponent by which the load falls from expert to expert; 0: even

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"router.k={self.k} must be at least 1")
        if not (self.skew >= 0 and math.isfinite(self.skew)):
            raise ConfigError(f"router.skew={self.skew} must be a number of at least 0; 0: an even load")
        check_scale(self.scale)

    @property
    def choices(self) -> int:
        return self.k

    @property
    def own_balance(self) -> str:
        return "" if self.skew else "tokens dealt in turn"

    @property
    def scores_have_gradient(self) -> bool:
        return False

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return ForcedRouter(dim, num_experts, self)


class ForcedRouter(Router):
    """The module of `Forced`; it owns nothing."""

    def __init__(self, dim: int, num_experts: int, config: Forced) -> None:
        super().__init__(dim, num_experts)
        self.config = config

    def route(self, tokens: RouterInput) -> RouterOutput:
        num_routed, device, k = len(tokens.token_R), tokens.x_RD.device, self.config.k
        if self.config.skew:
            share_E = zipf_shares(self.num_experts, k, self.config.skew)
            expert_RK = spread_by_share(share_E.to(device), num_routed, k)
        else:
            # k neighbours of the circle 0, 1, ..., E - 1, 0, ... for each token, so all differ
            expert_RK = torch.arange(num_routed * k, device=device).view(num_routed, k) % self.num_experts
        share, shape_RE = 1 / k, (num_routed, self.num_experts)
        assignment = from_topk(
            expert_RK,
            tokens.x_RD.new_full((num_routed, k), share * self.config.scale),
            tokens,
            num_experts=self.num_experts,
        )
        logits_RE = tokens.x_RD.new_full(shape_RE, -math.inf).scatter_(1, expert_RK, math.log(share))
        scores_RE = tokens.x_RD.new_zeros(shape_RE).scatter_(1, expert_RK, share)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)


def zipf_shares(num_experts: int, k: int, skew: float) -> Tensor:
    """Share of tokens that each expert takes: proportional to (e + 1)^-skew, none above 1, k in all.

    Shapes: returns (E,) float64.
    """
    full = 0  # experts that take every token
    while full < k and k - full > sum(_zipf_from(full, num_experts, skew)):
        full += 1
    rest = _zipf_from(full, num_experts, skew)
    factor = (k - full) / sum(rest)
    return torch.tensor([1.0] * full + [factor * weight for weight in rest], dtype=torch.float64)


def _zipf_from(first: int, num_experts: int, skew: float) -> list[float]:
    """Weights over that of expert `first`: the greatest is 1, however steep the fall."""
    return [((e + 1) / (first + 1)) ** -skew for e in range(first, num_experts)]


def spread_by_share(share_E: Tensor, num_tokens: int, k: int) -> Tensor:
    """k experts for each token, all different, by systematic sampling: expert e takes about share_e of the tokens.

    The experts stand side by side on a line, each as long as its share; a token takes those at k points one apart,
    which no expert of length 1 or less can hold two of. The first point of each token steps by the golden ratio.
    Shapes: share_E (E,) float64, at most 1 each, sum k; returns (num_tokens, k) int64.
    Source: Madow 1949, On the theory of systematic sampling II.
    """
    first_R = torch.arange(num_tokens, dtype=share_E.dtype, device=share_E.device).mul_(GOLDEN).remainder_(1)
    point_RK = first_R.unsqueeze(1) + torch.arange(k, device=share_E.device)
    # rounding can put the line's end just below k
    return torch.searchsorted(share_E.cumsum(0), point_RK, right=True).clamp_(max=len(share_E) - 1)
