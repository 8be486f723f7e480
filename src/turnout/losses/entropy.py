"""The entropy loss of top-p routing: tokens are to be sure of their experts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import Loss
from turnout.errors import ConfigError
from turnout.tensors import Admission, LossTerm, RouterOutput


def routing_entropy(scores_RE: Tensor) -> Tensor:
    """Mean over tokens of -sum_e p ln p, in nats; 0 with no tokens.

    Shapes: scores_RE (R, E), rows sum to 1; returns ().
    Source: Huang et al. 2024, arXiv:2403.07652, the dynamic loss (without beta).
    """
    # p ln p has an infinite slope at 0, which times the softmax's slope of 0 would be NaN
    log_RE = scores_RE.clamp(min=torch.finfo(scores_RE.dtype).tiny).log()
    return -(scores_RE * log_RE).sum() / max(scores_RE.shape[0], 1)


@Loss.TABLE.register("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(Loss):
    """Entropy of the scores: minimised with the rest, it rewards few likely experts, or top-p would take them all."""

    coefficient: float = 1e-4  # weight of the term in the total loss, the paper's beta

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"entropy.coefficient={self.coefficient} must be at least 0")

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """A mean over tokens: its scope does not change its expectation."""
        del admission, sequence_length, step_stats
        return LossTerm(
            name="entropy",
            value=routing_entropy(routing.scores_RE),
            coefficient=self.coefficient,
            scope="micro_batch",
        )
