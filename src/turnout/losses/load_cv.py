"""The load loss of Shazeer et al.: experts expect the same number of tokens."""

from dataclasses import dataclass

from turnout.contracts import Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.losses.cv_squared import cv_squared
from turnout.tensors import Admission, LossTerm, RouterOutput

NEEDS_NOISE = (
    "the loss load_cv needs a router with noise, which alone has a load with a gradient: noisy_topk, or topk with "
    "gate_noise above 0; for other routers use the loss importance or load_balance"
)


@Loss.TABLE.register("load_cv")
@dataclass(frozen=True, kw_only=True)
class LoadCV(Loss):
    """CV^2 of each expert's expected load, which only a router with noise has as a function with a gradient.

    With `importance`, each at half its coefficient, it is Tutel's load_importance_loss (see there).
    It is of the micro-batch, and no mean over tokens: other with more micro-batches or ranks (docs/layers.md).
    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 8-11, w_load of its language models.
    """

    balances = True

    coefficient: float = 0.1  # weight of the term in the total loss

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"load_cv.coefficient={self.coefficient} must be at least 0")

    def check_own(self, router: RouterConfig, num_experts: int) -> None:
        """Raises: ConfigError if the router has no expected load."""
        del num_experts
        if not router.gives_smooth_load:
            raise ConfigError(NEEDS_NOISE)

    def term(
        self, routing: RouterOutput, admission: Admission, *, sequence_length: int, step_stats: object = None
    ) -> LossTerm:
        """Raises: ConfigError if the router has no expected load."""
        del admission, sequence_length, step_stats
        if routing.smooth_load_E is None:
            raise ConfigError(NEEDS_NOISE)
        return LossTerm(
            name="load_cv",
            value=cv_squared(routing.smooth_load_E),
            coefficient=self.coefficient,
            scope="micro_batch",
        )
