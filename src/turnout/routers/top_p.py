"""Top-p: a token takes experts until their probabilities sum to p, so an uncertain token takes more of them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, select_topk
from turnout.tensors import Assignment, RouterInput, RouterOutput


@RouterConfig.TABLE.register("top_p")
@dataclass(frozen=True, kw_only=True)
class TopP(RouterConfig):
    """A token's experts are the fewest of highest probability that sum to at least p; weights are not renormalised.

    Nothing here keeps their number small: the paper adds an entropy loss with coefficient 1e-4, without which the
    router gains by being uncertain.
    Source: Huang et al. 2024, arXiv:2403.07652, section 2.2; `most` is ours.
    """

    p: float = 0.4  # least sum of the probabilities of a token's experts
    most: int = 0  # experts a token has at most; 0: all of them
    expected_choices: int = 2  # experts a token is thought to have on average; what FLOPs are counted with
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ConfigError(f"router.p={self.p} must be in (0, 1]")
        if self.most < 0:
            raise ConfigError(f"router.most={self.most} must be at least 0; 0 is no limit")
        if not 1 <= self.expected_choices <= (self.most or self.expected_choices):
            raise ConfigError(
                f"router.expected_choices={self.expected_choices} must be at least 1, and at most most={self.most} "
                "where that is not 0"
            )

    @property
    def choices(self) -> int:
        return self.expected_choices

    @property
    def exact_choices(self) -> bool:
        return False

    def build(self, dim: int, num_experts: int) -> Router:
        for name in ("most", "expected_choices"):
            if getattr(self, name) > num_experts:
                raise ConfigError(f"router.{name}={getattr(self, name)} is more than num_experts={num_experts}")
        return TopPRouter(dim, num_experts, self)


class TopPRouter(Router):
    """The module of `TopP`."""

    def __init__(self, dim: int, num_experts: int, config: TopP) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        """K is here the most choices a token may have."""
        logits_RE = self.score(tokens.x_RD)
        scores_RE = logits_RE.softmax(dim=1)
        expert_RK = select_topk(logits_RE, self.config.most or self.num_experts)
        score_RK = scores_RE.gather(1, expert_RK)
        row_N, choice_N = smallest_prefix(score_RK.detach(), self.config.p).nonzero(as_tuple=True)
        assignment = Assignment(
            token_N=tokens.token_R[row_N],
            expert_N=expert_RK[row_N, choice_N],
            weight_N=score_RK[row_N, choice_N],
            choice_N=choice_N,
            num_tokens=tokens.num_tokens,
            num_experts=self.num_experts,
        )
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)


def smallest_prefix(score_RK: Tensor, p: float) -> Tensor:
    """Which scores stand in the shortest start of their row that sums to at least p, or in the row if none does.

    Shapes: score_RK (R, K), best first; returns (R, K) bool, the first of a row always true.
    """
    # eight times 0.1 must not miss 0.8 by its last bits
    least = p * (1 - score_RK.shape[1] * torch.finfo(score_RK.dtype).eps)
    before_RK = F.pad(score_RK.cumsum(dim=1)[:, :-1], (1, 0))
    return before_RK < least
