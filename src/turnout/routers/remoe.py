"""ReMoE: the gates are ReLUs, so each token has as many experts as fire, and an adapted L1 term says how many."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, check_choices, from_chosen
from turnout.tensors import LossTerm, MoEStats, RouterInput, RouterOutput

# added to a token's sum of gates where they become shares: without it their gradient has no bound near 0 / 0
SMALL_SUM = 1e-3


@RouterConfig.TABLE.register("remoe")
@dataclass(frozen=True, kw_only=True)
class ReMoE(RouterConfig):
    """Weights are ReLU(x W): the expert goes to whom it is above 0, and all of routing has a gradient.

    The router's own loss is strength * mean over tokens of the sum of gates; after each step the strength is
    multiplied by `growth` if tokens had more than k experts on average, divided by it if fewer. Weights drawn
    evenly about 0 let half the experts fire at first, which is the paper's dense beginning. Strength and sparsity
    are each layer's own, and the strength stays from `start` to `limit`; the paper shares one strength among all
    layers and does not bound it, so a target that is missed for long lets it overflow, or vanish for as long again.
    Unless `balanced` is false the loss is weighed by the micro-batch's load, which is another one with more
    micro-batches or ranks to a step (docs/layers.md).
    Source: Wang, Zhu and Chen 2024 (ICLR 2025), arXiv:2412.14711.
    """

    k: int = 2  # experts per token aimed at on average
    balanced: bool = True  # the loss weighs an expert's gates by its load over the mean load aimed at
    start: float = 1e-8  # first and least strength of the loss
    growth: float = 1.2  # factor on the strength per optimizer step, or on its inverse
    limit: float = 1.0  # greatest strength
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"router.k={self.k} must be at least 1")
        if not 0 < self.start <= self.limit < math.inf:
            raise ConfigError(f"router.start={self.start} must be above 0 and at most router.limit={self.limit}")
        if not 1 < self.growth < math.inf:
            raise ConfigError(f"router.growth={self.growth} must be a number above 1")

    @property
    def choices(self) -> int:
        return self.k

    @property
    def exact_choices(self) -> bool:
        return False

    @property
    def own_balance(self) -> str:
        return "L1 of the gates weighed by load" if self.balanced else ""

    @property
    def needs_whole_layer(self) -> str:
        return "the number of its tokens"

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return ReMoERouter(dim, num_experts, self)


class ReMoERouter(Router):
    """The module of `ReMoE`: owns the score's weights, and how often the strength has grown."""

    growths: Tensor  # () int64: a whole number, so that a model in bfloat16 keeps its strength

    def __init__(self, dim: int, num_experts: int, config: ReMoE) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)
        self.register_buffer("growths", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """The score resets itself."""
        self.growths.zero_()

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE = self.score(tokens.x_RD)
        gates_RE = logits_RE.relu()
        assignment = from_chosen(logits_RE > 0, gates_RE, tokens)
        strength = self.config.start * self.config.growth ** self.growths.to(gates_RE.dtype)
        target = self.config.k if self.config.balanced else None
        value = strength * gate_l1(gates_RE, assignment.counts_E, target)
        return RouterOutput(
            assignment=assignment,
            logits_RE=logits_RE,
            scores_RE=gate_shares(gates_RE),
            token_R=tokens.token_R,
            losses=(LossTerm(name="relu_l1", value=value, coefficient=1.0, scope="micro_batch"),),
        )

    @torch.no_grad()
    def after_step(self, stats: MoEStats) -> None:
        """The sign of (1 - k / E) - sparsity, in whole numbers: that of experts chosen less experts aimed at."""
        excess = stats.assigned_E.sum() - self.config.k * stats.num_routed
        most_growths = math.floor(math.log(self.config.limit / self.config.start) / math.log(self.config.growth))
        self.growths.add_(excess.sign()).clamp_(0, most_growths)


def gate_l1(gates_RE: Tensor, counts_E: Tensor, k: int | None) -> Tensor:
    """Mean over tokens of the sum of gates, each expert's weighed by E / (k R) * its tokens unless k is None.

    With no tokens it is 0.
    Shapes: gates_RE (R, E), none below 0; counts_E (E,) tokens of each expert; returns ().
    Source: arXiv:2412.14711, L_reg and, with k, its load-balanced form, for one layer.
    """
    num_tokens, num_experts = gates_RE.shape
    gate_sum_E = gates_RE.sum(dim=0) / max(num_tokens, 1)
    if k is None:
        return gate_sum_E.sum()
    load_E = counts_E.to(gates_RE.dtype) * (num_experts / (k * max(num_tokens, 1)))
    return (load_E * gate_sum_E).sum()


def gate_shares(gates_RE: Tensor) -> Tensor:
    """Each gate over the sum of its row's; equal shares where no gate is above 0.

    Shapes: gates_RE (R, E), none below 0; returns (R, E), rows sum to 1.
    """
    num_experts = gates_RE.shape[1]
    return (gates_RE + SMALL_SUM / num_experts) / (gates_RE.sum(dim=1, keepdim=True) + SMALL_SUM)
