"""`HMERegressor`: regression and counts by a hierarchical mixture of experts, with scikit-learn's contract."""

from typing import Any, Literal, Self

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_is_fitted

from turnout.errors import ConfigError
from turnout.hme.base import HMEBase
from turnout.hme.checks import Scale, check_choice, check_given, check_positive, unchanged_by_errors
from turnout.hme.distribution import Predictive
from turnout.hme.families import MOST_COUNT, Family, Poisson
from turnout.hme.gaussian import Gaussian
from turnout.hme.tree import Floats


class HMERegressor(RegressorMixin, HMEBase):
    """Regression by a tree of gates over linear experts, fitted by EM.

    `depth` and `branching` give branching ** depth experts; depth 1 is the flat mixture of 1991. `noise` is the form of
    each expert's covariance (unit, scalar, diagonal, full), which starts at `noise_start` variances of the targets and
    stays there for the first `hold_noise` iterations of EM: with some 25 held at 0.3, many experts on smooth data find
    far better partitions than with none. `family="poisson"` takes counts. `max_experts` grows the tree, `prune` shrinks
    it. `max_iter` None is 100 iterations, or 3 passes on-line. `batch_size` rows are learned
    from at once by gradient and on-line.
    Fitted: `mixture_`; `loglik_path_` (nats, before each iteration and after the last) and `loglik_` of the mixture
    itself; `objective_path_` (with the log prior of ridge and noise, which EM never lowers); `n_iter_`, `n_passes_`
    (over the rows), `converged_`.
    Source: Jordan & Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm"; Jacobs et al. 1991.
    """

    def __init__(
        self,
        depth: int = 2,
        branching: int = 2,
        *,
        family: Literal["gaussian", "poisson"] = "gaussian",
        noise: Literal["unit", "scalar", "diagonal", "full"] = "scalar",
        noise_start: float = 1.0,
        hold_noise: int = 0,
        solver: Literal["em", "least_squares", "gradient", "online"] = "em",
        max_iter: int | None = None,
        tol: float = 1e-5,
        newton_steps: int = 1,
        ridge: float = 1e-3,
        n_init: int = 1,
        max_experts: int | None = None,
        prune: bool = False,
        error: Literal["mixture", "competition", "cooperation"] = "mixture",
        learning_rate: float = 0.02,
        momentum: float = 0.9,
        batch_size: int = 32,
        forgetting: float = 0.99,
        missing: Literal["refuse", "mean"] = "refuse",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            depth, branching, solver=solver, max_iter=max_iter, tol=tol, newton_steps=newton_steps, ridge=ridge,
            n_init=n_init, max_experts=max_experts, prune=prune, error=error, learning_rate=learning_rate,
            momentum=momentum, batch_size=batch_size, forgetting=forgetting, missing=missing,
            random_state=random_state,
        )  # fmt: skip
        self.family = family
        self.noise: Literal["unit", "scalar", "diagonal", "full"] = noise
        self.noise_start = noise_start
        self.hold_noise = hold_noise

    def predict(self, X: Any) -> Floats:
        """Mean of the mixture: (N,), or (N, O) where y had columns."""
        check_is_fitted(self)
        scale = self.target_scale_
        mean_NO = self._by_block(X, lambda x_PN: self.mixture_.mean(x_PN).T) * scale.deviation_D + scale.mean_D
        return mean_NO[:, 0] if self.is_column_ else mean_NO

    def predict_dist(self, X: Any) -> Predictive:
        """The mixture itself, for mean, variance and quantiles of each row."""
        check_is_fitted(self)
        scale, mixture = self.target_scale_, self.mixture_
        mean_NLO = self._by_block(X, lambda x_PN: mixture.family.mean(x_PN, mixture.experts).transpose(2, 0, 1))
        mean_NLO = mean_NLO * scale.deviation_D + scale.mean_D
        is_poisson = isinstance(mixture.family, Poisson)
        variance_LO = np.diagonal(mixture.experts.covariance_LOO, axis1=1, axis2=2) * scale.deviation_D**2
        return Predictive(
            weight_NL=self.apply(X),
            mean_NLO=mean_NLO,
            variance_NLO=mean_NLO if is_poisson else np.broadcast_to(variance_LO, mean_NLO.shape),
            is_poisson=is_poisson,
        )

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn more rows on-line: recursive least squares (Gaussian experts), recursive Newton steps (Poisson).

        After `fit` it goes on from the fit; a first call sets the scale of all columns.
        """
        first = not hasattr(self, "mixture_")
        with unchanged_by_errors(self):
            if first:
                self.is_column_ = np.ndim(y) == 1
            return self._partial_fit(X, y, sample_weight, first=first)

    def _targets(self, y: Any, num_rows: int, *, reset: bool) -> Floats:
        check_choice("family", self.family, ("gaussian", "poisson"))
        check_given(y)
        numbers = _numbers(y)
        y_NT = numbers.reshape(len(numbers), -1)
        if len(y_NT) != num_rows:
            raise ValueError(f"X has {num_rows} rows and y {len(y_NT)}: inconsistent numbers of samples")
        if self.family == "poisson":
            if y_NT.shape[1] > 1 or (y_NT < 0).any():
                raise ValueError("family='poisson' needs one column of counts, none below 0")
            if (y_NT > MOST_COUNT).any():
                raise ValueError(
                    f"family='poisson' needs counts of up to {MOST_COUNT:g}, not {y_NT.max():g}; "
                    "family='gaussian' takes numbers of any size"
                )
        if reset:
            self.is_column_ = numbers.ndim == 1
        return y_NT

    def _family(self, targets: int) -> Family:
        check_positive("noise_start", self.noise_start)
        if self.family == "poisson":
            if self.noise_start != 1 or self.hold_noise:
                raise ValueError(
                    f"noise_start={self.noise_start} and hold_noise={self.hold_noise} need family='gaussian': "
                    "counts have no noise of their own"
                )
            return Poisson()
        try:
            return Gaussian(targets=targets, noise=self.noise, noise_start=self.noise_start)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def _target_scale(self, y_NT: Floats, weight_N: Floats) -> Scale:
        if self.family == "poisson":
            return Scale(mean_D=np.zeros(1), deviation_D=np.ones(1))
        return Scale.of(y_NT, weight_N)

    def _target_names(self) -> list[str]:
        return [f"y{i}" if len(self.target_scale_.mean_D) > 1 else "y" for i in range(len(self.target_scale_.mean_D))]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = self.family == "gaussian"
        tags.target_tags.positive_only = self.family == "poisson"
        return tags


def _numbers(y: Any) -> Floats:
    y_NT = np.asarray(y)
    if y_NT.dtype.kind not in "fiub":
        y_NT = y_NT.astype(np.float64)
    if y_NT.ndim not in (1, 2) or np.iscomplexobj(y_NT):
        raise ValueError(f"y has shape {y_NT.shape}; it must be a column, or rows by outputs, of real numbers")
    if not np.isfinite(y_NT).all():
        raise ValueError("Input y contains NaN or infinity; leave out these rows")
    return y_NT.astype(np.float64)
