"""Noisy top-k: the first sparse gate; learned noise spreads the tokens, and gives the load a gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, check_choices, from_topk, normal_draw, select_topk, smooth_load
from turnout.tensors import RouterInput, RouterOutput

# added to the deviation, which softplus alone lets fall to 0, where the load has no gradient (FastMoE's noisy gate)
LEAST_STD = 0.01


@RouterConfig.TABLE.register("noisy_topk")
@dataclass(frozen=True, kw_only=True)
class NoisyTopK(RouterConfig):
    """Noisy top-k gating: H = x W_g + N(0, 1) * (softplus(x W_n) + 0.01), and the softmax of its k greatest.

    Both matrices start at zero, as in the paper: in training the noise then chooses, every expert equally often; in
    evaluation, where there is none, all logits tie and the first k experts take every token until W_g has moved.
    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5 and appendix A; the 0.01 is FastMoE's.
    """

    k: int = 4  # experts per token
    init_std: float = 0.0  # standard deviation of the initial weights, of the score and of its noise

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ConfigError(
                f"router.k={self.k} must be at least 2: the weight of a single choice is 1 and has no gradient"
            )

    @property
    def choices(self) -> int:
        return self.k

    @property
    def gives_smooth_load(self) -> bool:
        return True

    def build(self, dim: int, num_experts: int) -> Router:
        check_choices(self.k, num_experts, least=2)
        return NoisyTopKRouter(dim, num_experts, self)


class NoisyTopKRouter(Router):
    """The module of `NoisyTopK`: owns W_g and W_n."""

    def __init__(self, dim: int, num_experts: int, config: NoisyTopK) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)
        self.noise = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        """Weights, scores and logits are those of H; without noise the smooth load is the count, with no gradient."""
        clean_RE = self.score(tokens.x_RD)
        std_RE = F.softplus(self.noise(tokens.x_RD)) + LEAST_STD
        # zeros in evaluation, so that the noise's weights have a gradient there too: zero
        draw_RE = normal_draw(clean_RE, tokens.generator) if self.training else torch.zeros_like(clean_RE)
        logits_RE = clean_RE + draw_RE * std_RE
        expert_RK = select_topk(logits_RE, self.config.k)
        weight_RK = logits_RE.gather(1, expert_RK).softmax(dim=1)
        assignment = from_topk(expert_RK, weight_RK, tokens, num_experts=self.num_experts)
        if self.training:
            smooth_load_E = load_if_redrawn(clean_RE, std_RE, logits_RE, expert_RK)
        else:
            smooth_load_E = assignment.counts_E.to(clean_RE.dtype)
        return RouterOutput(
            assignment=assignment,
            logits_RE=logits_RE,
            scores_RE=logits_RE.softmax(dim=1),
            token_R=tokens.token_R,
            smooth_load_E=smooth_load_E,
        )


def load_if_redrawn(clean_RE: Tensor, std_RE: Tensor, noisy_RE: Tensor, expert_RK: Tensor) -> Tensor:
    """Sum over tokens of P(x, i): the chance that i is chosen if its noise alone is drawn again.

    The k-th greatest score of the others is the (k + 1)-th of all for a chosen expert, the k-th for another one. Its
    mean over draws is the mean load.
    Shapes: expert_RK (R, K), the choice of noisy_RE, best first; returns (E,).
    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 8-10.
    """
    num_tokens, num_experts = clean_RE.shape
    if expert_RK.shape[1] == num_experts:
        return clean_RE.new_full((num_experts,), float(num_tokens))
    chosen_RE = torch.zeros_like(noisy_RE, dtype=torch.bool).scatter(1, expert_RK, True)
    kth_R1 = noisy_RE.gather(1, expert_RK[:, -1:])
    next_R1 = noisy_RE.masked_fill(chosen_RE, -torch.inf).amax(dim=1, keepdim=True)
    return smooth_load(clean_RE, torch.where(chosen_RE, next_R1, kth_R1), std_RE)
