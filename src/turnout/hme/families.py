"""What an expert says of its rows: families of densities with parameters linear in the inputs, all experts at once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import gammaln

from turnout.hme.algebra import MakeRoom, room
from turnout.hme.glim import Moments, Slopes
from turnout.hme.shares import predictors, softmax_slopes, softmax_with_last_zero
from turnout.hme.tree import Floats

# e ** 30 events a row: beyond any count that is taken, and no exponential of it overflows
MOST_LOG_RATE = 30.0
MOST_COUNT = 1e12


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """Parameters of L experts; families without noise of their own keep `covariance_LOO` empty."""

    weight_LPO: Floats
    covariance_LOO: Floats

    @cached_property
    def roots(self) -> tuple[Floats, Floats]:
        """Cholesky factors C of twice the covariances, and C^-T, which makes residuals (as rows) white.

        Twice: then the squared length of a white residual is what it takes from the log density.
        """
        root_LOO: Floats = np.asarray(np.linalg.cholesky(2 * self.covariance_LOO), dtype=np.float64)
        whiten_LOO: Floats = np.asarray(np.linalg.inv(root_LOO), dtype=np.float64).swapaxes(1, 2)
        return root_LOO, whiten_LOO

    @cached_property
    def white_LZO(self) -> Floats:
        """Predictors of the white residuals from inputs and targets together: minus the weights, above the identity."""
        _, whiten_LOO = self.roots
        return np.concatenate([self.weight_LPO @ -whiten_LOO, whiten_LOO], axis=1)

    @cached_property
    def log_root_L(self) -> Floats:
        """Half the log determinants of the covariances."""
        root_LOO, _ = self.roots
        diagonal_LO = np.diagonal(root_LOO, axis1=1, axis2=2) / np.sqrt(2)
        return np.asarray(np.log(diagonal_LO).sum(axis=1), dtype=np.float64)

    def __getitem__(self, leaves: Any) -> "Experts":
        """The experts at these leaves, by anything that indexes an axis."""
        return Experts(weight_LPO=self.weight_LPO[leaves], covariance_LOO=self.covariance_LOO[leaves])


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """What experts say of a block of rows."""

    log_density_LN: Floats
    signal_LON: Floats  # Gaussian: whitened residuals; softmax: shares of all classes but the last; Poisson: rates
    square_LN: Floats | None = None  # Gaussian: squared white residuals, of all outputs together


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertSums:
    """Moments of the experts, and of Gaussian ones the weighted squares of residuals."""

    moments: Moments
    weight_L: Floats
    square_LOO: Floats

    def __add__(self, other: "ExpertSums") -> "ExpertSums":
        return ExpertSums(
            moments=self.moments + other.moments,
            weight_L=self.weight_L + other.weight_L,
            square_LOO=self.square_LOO + other.square_LOO,
        )


class Family(ABC):
    """Densities of one kind. `targets` are columns of y, `outputs` linear predictors of an expert."""

    targets: int

    @property
    @abstractmethod
    def outputs(self) -> int: ...

    @property
    @abstractmethod
    def noise_parameters(self) -> int:
        """Free parameters of one expert's noise."""

    @abstractmethod
    def start(self, y_TN: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """Experts that all say the same, so that the first posteriors are the gates' priors."""

    @abstractmethod
    def judge(self, predictor_LON: Floats, y_TN: Floats, experts: Experts, make: MakeRoom = room) -> Judgement:
        """Log densities of the targets under each expert by its linear predictors, and what `slopes` needs.

        `make`: where the arrays of the result may stand.
        """

    def weights(self, experts: Experts) -> Floats:
        """Weights of the linear predictors, (L, P, O), or (L, Z, O) where they read the targets too."""
        return experts.weight_LPO

    @abstractmethod
    def slopes(self, y_TN: Floats, weight_LN: Floats, judged: Judgement, out_LON: Floats) -> Slopes:
        """Derivatives by the predictors, rows weighted by `weight_LN` (posterior times sample weight).

        Scores go to `out_LON`, which may be where the predictors stood; so `judged` is used up.
        """

    def squares(self, weight_LN: Floats, judged: Judgement) -> Floats:
        """Weighted products of white residuals, (L, O, O); (L, 0, 0) unless a family has noise of its own."""
        return np.zeros((len(judged.log_density_LN), 0, 0))

    def coloured(self, sums: ExpertSums, experts: Experts) -> ExpertSums:
        """Sums over white residuals of `experts` in the units of the targets; as they are unless a family whitens."""
        return sums

    @abstractmethod
    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        """Expected targets of each expert, (L, T, N)."""

    @abstractmethod
    def log_prior(self, experts: Experts, ridge_P: Floats) -> float:
        """Log prior of the experts, up to a constant: what the M-step adds to the log-likelihood."""


@dataclass(frozen=True, kw_only=True)
class Softmax(Family):
    """Softmax experts over `targets` classes; the last class's predictor is zero. Two classes: logistic experts."""

    targets: int

    @property
    def outputs(self) -> int:
        return self.targets - 1

    @property
    def noise_parameters(self) -> int:
        return 0

    def start(self, y_TN: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """All classes equally probable."""
        return _without_noise(np.zeros((num_leaves, size, self.outputs)))

    def judge(self, predictor_LON: Floats, y_TN: Floats, experts: Experts, make: MakeRoom = room) -> Judgement:
        shares = softmax_with_last_zero(predictor_LON)
        return Judgement(log_density_LN=(y_TN * shares.log_MBN).sum(axis=1), signal_LON=shares.free_MON)

    def slopes(self, y_TN: Floats, weight_LN: Floats, judged: Judgement, out_LON: Floats) -> Slopes:
        weight_L1N = weight_LN[:, None]
        return softmax_slopes(judged.signal_LON, weight_L1N * y_TN[:-1], weight_L1N, score_MON=out_LON)

    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        return np.exp(softmax_with_last_zero(predictors(x_PN, experts.weight_LPO)).log_MBN)

    def log_prior(self, experts: Experts, ridge_P: Floats) -> float:
        return ridge_log_prior(experts.weight_LPO, ridge_P)


@dataclass(frozen=True, kw_only=True)
class Poisson(Family):
    """Poisson experts with a log link, for counts."""

    targets: int = 1

    @property
    def outputs(self) -> int:
        return 1

    @property
    def noise_parameters(self) -> int:
        return 0

    def start(self, y_TN: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """The mean count everywhere: from a rate of one, Newton's first step would be far too long."""
        weight_LPO = np.zeros((num_leaves, size, 1))
        weight_LPO[:, -1] = np.log(max(float(np.average(y_TN[0], weights=weight_N)), 1e-3))
        return _without_noise(weight_LPO)

    def judge(self, predictor_LON: Floats, y_TN: Floats, experts: Experts, make: MakeRoom = room) -> Judgement:
        log_rate_LN = predictor_LON[:, 0].clip(-MOST_LOG_RATE, MOST_LOG_RATE)
        rate_LN = np.exp(log_rate_LN)
        return Judgement(log_density_LN=y_TN * log_rate_LN - rate_LN - gammaln(y_TN + 1), signal_LON=rate_LN[:, None])

    def slopes(self, y_TN: Floats, weight_LN: Floats, judged: Judgement, out_LON: Floats) -> Slopes:
        weight_L1N, rate_L1N = weight_LN[:, None], judged.signal_LON
        np.multiply(weight_L1N, y_TN - rate_L1N, out=out_LON)
        return Slopes(score_MON=out_LON, curvature_MCN=weight_L1N * rate_L1N)

    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        return np.exp(predictors(x_PN, experts.weight_LPO).clip(-MOST_LOG_RATE, MOST_LOG_RATE))

    def log_prior(self, experts: Experts, ridge_P: Floats) -> float:
        return ridge_log_prior(experts.weight_LPO, ridge_P)


def ridge_log_prior(weight_MPO: Floats, ridge_P: Floats) -> float:
    """Minus half the ridge times squared weights, over all models."""
    return -0.5 * float((ridge_P[:, None] * weight_MPO**2).sum())


def _without_noise(weight_LPO: Floats) -> Experts:
    return Experts(weight_LPO=weight_LPO, covariance_LOO=np.zeros((len(weight_LPO), 0, 0)))
