"""GShard: two experts a token, the second one by chance."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError
from turnout.routers.pieces import LinearScore, from_topk, gumbel, select_topk
from turnout.tensors import RouterInput, RouterOutput


@RouterConfig.TABLE.register("gshard")
@dataclass(frozen=True, kw_only=True)
class GShardTop2(RouterConfig):
    """Top-2 gating of GShard, algorithm 1; with `FixedCapacity` it keeps exactly what the paper's loops keep.

    A declined second choice still holds its place in the expert's queue, and a kept weight is not renormalised
    when its partner is dropped: both as the algorithm is printed.
    Policies of the second expert, g2 being its renormalised weight: random, sent with probability 2 * g2 (the
    paper); all, always sent; none, never; threshold, where g2 > `threshold` (these three: Mesh-TensorFlow, which
    gives a declined choice no place); sampled, drawn from the softmax without the first, always sent (Lingvo).
    In evaluation random sends all, and sampled takes the second best: chance is a regulariser of training.
    Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1; second_policy in
        https://github.com/tensorflow/mesh/blob/master/mesh_tensorflow/transformer/moe.py; second_expert_policy in
        https://github.com/tensorflow/lingvo/blob/master/lingvo/core/gshard_layers.py.
    """

    second_expert: Literal["random", "all", "none", "threshold", "sampled"] = "random"  # when it is sent, and which
    threshold: float = 0.2  # of the policy threshold: what the second weight must exceed to be sent
    init_std: float = 0.02  # standard deviation of the score's initial weights

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 0.5:
            raise ConfigError(
                f"router.threshold={self.threshold} must be in [0, 0.5): no second weight is above a half; "
                "to send none set second_expert='none'"
            )

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
        logits_RE = self.score(tokens.x_RD)
        expert_R2 = self._pair(logits_RE, tokens)
        # g1 / (g1 + g2) of the full softmax, without its overflow
        weight_R2 = logits_RE.gather(1, expert_R2).softmax(dim=1)
        limit = self._limit(tokens)
        declined_N = None if limit is None else declined_second(weight_R2.detach(), limit).reshape(-1)
        assignment = from_topk(
            expert_R2,
            weight_R2,
            tokens,
            num_experts=self.num_experts,
            declined_N=declined_N,
        )
        scores_RE = logits_RE.softmax(dim=1)
        return RouterOutput(assignment=assignment, logits_RE=logits_RE, scores_RE=scores_RE, token_R=tokens.token_R)

    def _pair(self, logits_RE: Tensor, tokens: RouterInput) -> Tensor:
        if not self.training or self.config.second_expert != "sampled":
            return select_topk(logits_RE, 2)
        uniform_RE = torch.rand(
            logits_RE.shape, dtype=torch.float32, device=logits_RE.device, generator=tokens.generator
        )
        return best_and_sampled(logits_RE, uniform_RE)

    def _limit(self, tokens: RouterInput) -> Tensor | float | None:
        """What a second weight must exceed to be sent; None when all are sent."""
        policy = self.config.second_expert
        if policy == "none":
            return 1.0
        if policy == "threshold":
            return self.config.threshold
        if policy == "random" and self.training:
            draw_R = torch.rand(
                len(tokens.token_R), dtype=tokens.x_RD.dtype, device=tokens.x_RD.device, generator=tokens.generator
            )
            # g2 > r / 2 is the paper's 2 * g2 > r: halving rounds nothing
            return draw_R / 2
        return None


def best_and_sampled(logits_RE: Tensor, uniform_RE: Tensor) -> Tensor:
    """The best expert, and one drawn from the softmax of the others.

    Shapes: logits_RE (R, E); uniform_RE (R, E) in [0, 1); returns expert_R2 (R, 2).
    """
    best_R1 = select_topk(logits_RE, 1)
    noisy_RE = logits_RE.detach() + gumbel(uniform_RE.to(logits_RE.dtype))
    return torch.cat([best_R1, select_topk(noisy_RE.scatter(1, best_R1, -torch.inf), 1)], dim=1)


def declined_second(weight_R2: Tensor, limit: Tensor | float) -> Tensor:
    """Which choices are declined: the second, unless its weight exceeds the limit.

    Shapes: weight_R2 (R, 2) renormalised; limit () or (R,); returns (R, 2) bool.
    """
    declined_R = ~(weight_R2[:, 1] > limit)
    return torch.stack([torch.zeros_like(declined_R), declined_R], dim=1)
