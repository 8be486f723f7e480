"""GShard: two experts a token, the second one by chance."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, from_topk, select_topk
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("gshard")
@dataclass(frozen=True, kw_only=True)
class GShardTop2(RouterConfig):
    """Top-2 gating of GShard, algorithm 1; with `FixedCapacity` it keeps exactly what the paper's loops keep.

    A declined second choice still holds its place in the expert's queue, and a kept weight is not renormalised
    when its partner is dropped: both as the algorithm is printed.
    Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1.
    """

    second_expert: Literal["random", "all"] = "random"  # random: sent with probability 2 * g2; all: always sent
    init_std: float = 0.02  # standard deviation of the score's initial weights

    @property
    def choices(self) -> int:
        return 2

    def build(self, dim: int, num_experts: int) -> Router:
        if num_experts < 2:
            raise ConfigError(f"the gshard router needs at least 2 experts; num_experts={num_experts}")
        return GShardRouter(dim, num_experts, self)


class GShardRouter(Router):
    """The module of `GShardTop2`."""

    def __init__(self, dim: int, num_experts: int, config: GShardTop2) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.score = LinearScore(dim, num_experts, bias=False, init_std=config.init_std)

    def route(self, tokens: RouterInput) -> RouterOutput:
        """In evaluation the second expert is always sent: chance is a regulariser of training."""
        logits_RE = self.score(tokens.x_RD)
        expert_R2 = select_topk(logits_RE, 2)
        # g1 / (g1 + g2) of the full softmax, without its overflow
        weight_R2 = logits_RE.gather(1, expert_R2).softmax(dim=1)
        declined_N = None
        if self.training and self.config.second_expert == "random":
            draw_R = torch.rand(
                len(tokens.token_R), dtype=tokens.x_RD.dtype, device=tokens.x_RD.device, generator=tokens.generator
            )
            declined_N = declined_second(weight_R2.detach(), draw_R).reshape(-1)
        assignment = from_topk(
            expert_R2,
            weight_R2,
            tokens,
            num_experts=self.num_experts,
            declined_N=declined_N,
        )
        scores_RE = logits_RE.softmax(dim=1)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)


def declined_second(weight_R2: Tensor, draw_R: Tensor) -> Tensor:
    """Which choices chance declines: the second, unless 2 * g2 > r.

    Shapes: weight_R2 (R, 2) renormalised; draw_R (R,) uniform in [0, 1); returns (R, 2) bool.
    """
    declined_R = ~(2 * weight_R2[:, 1] > draw_R)
    return torch.stack([torch.zeros_like(declined_R), declined_R], dim=1)
