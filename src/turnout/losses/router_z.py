"""The router z-loss of ST-MoE: keeps router logits small."""

from dataclasses import dataclass

from torch import Tensor

from turnout.contracts import Loss
from turnout.errors import ConfigError
from turnout.tensors import Admission, LossTerm, RouterOutput


def router_z_loss(logits_RE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2; 0 with no tokens.

    Shapes: logits_RE (R, E); returns ().
    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return logits_RE.logsumexp(dim=1).square().sum() / max(logits_RE.shape[0], 1)


@Loss.TABLE.register("router_z")
@dataclass(frozen=True, kw_only=True)
class RouterZ(Loss):
    """Router z-loss over the micro-batch."""

    coefficient: float = 0.001  # weight of the term in the total loss

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"router_z.coefficient={self.coefficient} must be at least 0")

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """A mean over tokens: its scope does not change its expectation."""
        del admission, sequence_length, step_stats
        return LossTerm(
            name="router_z",
            value=router_z_loss(routing.logits_RE),
            coefficient=self.coefficient,
            scope="micro_batch",
        )
