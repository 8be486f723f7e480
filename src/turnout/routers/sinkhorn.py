"""Sinkhorn: in training, tokens choose by scores scaled until every expert is wanted equally."""

import math
from dataclasses import dataclass

from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, check_choices, from_topk, select_topk, sigmoid_shares
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("sinkhorn")
@dataclass(frozen=True, kw_only=True)
class Sinkhorn(RouterConfig):
    """In training the k best of a transport plan between tokens and experts, in evaluation of the logits alone.

    The plan only chooses, without a gradient: the weight is the sigmoid of the logit where k is 1, else the full
    softmax. Equal plans for a token and its neighbours cannot part them, so loads are even about, not exactly.
    Source: Clark et al. 2022, arXiv:2202.01169 (S-BASE); gates as in Megatron-Core's sinkhorn router.
    """

    k: int = 1  # experts per token
    tolerance: float = 1e-4  # rounds end when the logs of the experts' factors change by less on average
    max_rounds: int = 100  # most rounds of scaling
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        for name in ("k", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"router.{name}={getattr(self, name)} must be at least 1")
        if not self.tolerance > 0:
            raise ConfigError(f"router.tolerance={self.tolerance} must be above 0")

    @property
    def choices(self) -> int:
        return self.k

    @property
    def own_balance(self) -> str:
        return "sinkhorn scaling in training"

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts)
        return SinkhornRouter(dim, num_experts, self)


class SinkhornRouter(Router):
    """The module of `Sinkhorn`."""

    def __init__(self, dim: int, num_experts: int, config: Sinkhorn) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        logits_RE, k = self.score(tokens.x_RD), self.config.k
        wanted_RE = logits_RE.detach()
        if self.training:
            wanted_RE = sinkhorn_log_plan(wanted_RE, tolerance=self.config.tolerance, max_rounds=self.config.max_rounds)
        expert_RK = select_topk(wanted_RE, k)
        scores_RE = sigmoid_shares(logits_RE) if k == 1 else logits_RE.softmax(dim=1)
        gates_RE = logits_RE.sigmoid() if k == 1 else scores_RE
        assignment = from_topk(expert_RK, gates_RE.gather(1, expert_RK), tokens, num_experts=self.num_experts)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)


def sinkhorn_log_plan(logits_RE: Tensor, *, tolerance: float, max_rounds: int) -> Tensor:
    """Log of the plan d0_R * exp(logits_RE) * d1_E whose columns sum to 1 / E and rows to about 1 / R.

    Rounds of scaling rows, then columns, until the mean change of log d1 is at most `tolerance`. In the logarithm
    nothing overflows, and the change of a factor is measured against the factor.
    Shapes: logits_RE (R, E); returns (R, E).
    """
    num_tokens, num_experts = logits_RE.shape
    if num_tokens == 0:
        return logits_RE
    # a row's factor takes up what its logits have in common, which would only cost digits
    logits_RE = logits_RE - logits_RE.amax(dim=1, keepdim=True)
    scaled_RE, column_E = logits_RE, logits_RE.new_zeros(num_experts)
    for _ in range(max_rounds):
        row_R1 = -(logits_RE + column_E).logsumexp(dim=1, keepdim=True) - math.log(num_tokens)
        scaled_RE, before_E = logits_RE + row_R1, column_E
        column_E = -scaled_RE.logsumexp(dim=0) - math.log(num_experts)
        if bool((column_E - before_E).abs().mean() <= tolerance):
            break
    return scaled_RE + column_E
