"""The importance loss of Shazeer et al.: experts get the same sum of scores."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from turnout.contracts import Loss
from turnout.errors import ConfigError
from turnout.losses.cv_squared import cv_squared
from turnout.tensors import Admission, LossTerm, RouterOutput


@Loss.TABLE.register("importance")
@dataclass(frozen=True, kw_only=True)
class Importance(Loss):
    """CV^2 of what each expert is given by all tokens of the micro-batch.

    Tutel's load_importance_loss is this loss and `load_cv`, each at half its coefficient; its variance divides by
    E - 1, so that its coefficients are worth E / (E - 1) of these.
    It is of the micro-batch, and no mean over tokens: with as many tokens in more micro-batches or on more ranks it is
    greater (docs/layers.md).
    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 6-7, w_importance of its language models.
    """

    balances = True

    coefficient: float = 0.1  # weight of the term in the total loss
    of: Literal["scores", "weights"] = "scores"  # summed: all scores (Tutel), or the chosen weights (the paper's gates)

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"importance.coefficient={self.coefficient} must be at least 0")

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """Counts every choice made, dropped or not."""
        del admission, sequence_length, step_stats
        return LossTerm(
            name="importance",
            value=cv_squared(self._importance(routing)),
            coefficient=self.coefficient,
            scope="micro_batch",
        )

    def _importance(self, routing: RouterOutput) -> Tensor:
        if self.of == "scores":
            return routing.scores_RE.sum(dim=0)
        weight_N = routing.assignment.weight_N
        return weight_N.new_zeros(routing.assignment.num_experts).index_add(0, routing.assignment.expert_N, weight_N)
