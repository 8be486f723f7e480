"""What an expert says of its rows: families of densities with parameters linear in the inputs, all experts at once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from scipy.special import gammaln

from turnout.errors import ConfigError
from turnout.hme.algebra import log_sum_exp
from turnout.hme.glim import Moments, softmax_curvature
from turnout.hme.tree import Floats

# e ** 30 events a row: beyond any count, and no exponential of it overflows
MOST_LOG_RATE = 30.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """Parameters of L experts; families without noise of their own keep `covariance_LOO` empty."""

    weight_LPO: Floats
    covariance_LOO: Floats

    def __getitem__(self, leaf_L: object) -> "Experts":
        return Experts(weight_LPO=self.weight_LPO[leaf_L], covariance_LOO=self.covariance_LOO[leaf_L])  # type: ignore[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """What experts say of a block of rows."""

    log_density_LN: Floats
    signal_LON: Floats  # Gaussian: whitened residuals; softmax: log shares; Poisson: rates


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

    is_closed: ClassVar[bool]  # one weighted least squares is the whole M-step
    targets: int

    @property
    @abstractmethod
    def outputs(self) -> int: ...

    @abstractmethod
    def judge(self, x_PN: Floats, y_TN: Floats, experts: Experts) -> Judgement:
        """Log densities of the targets under each expert, and what `sums` needs."""

    @abstractmethod
    def sums(
        self, x_PN: Floats, product_QN: Floats, y_TN: Floats, weight_LN: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        """Moments at `experts` with rows weighted by `weight_LN` (posterior times sample weight)."""

    @abstractmethod
    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        """Expected targets of each expert, (L, T, N)."""

    def start(self, y_TN: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """Experts that all say the same, so that the first posteriors are the gates' priors."""
        weight_LPO = np.zeros((num_leaves, size, self.outputs))
        return Experts(weight_LPO=weight_LPO, covariance_LOO=np.zeros((num_leaves, 0, 0)))


@dataclass(frozen=True, kw_only=True)
class Gaussian(Family):
    """Linear-Gaussian experts: y ~ N(U x, Sigma) with a noise of each expert's own.

    A noise prior of `noise_rows` rows with squared residual `noise_floor` keeps an expert that fits its rows exactly
    from an infinite likelihood.
    """

    targets: int
    noise: Literal["unit", "scalar", "diagonal", "full"] = "scalar"  # form of Sigma; unit: the identity, as in 1994
    noise_rows: float = 1.0  # strength of the noise prior, in rows
    noise_floor: float = 1e-4  # its variance, in variances of the targets
    is_closed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.noise not in ("unit", "scalar", "diagonal", "full"):
            raise ConfigError(f"noise={self.noise!r} must be one of: unit, scalar, diagonal, full")

    @property
    def outputs(self) -> int:
        return self.targets

    def start(self, y_TN: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """Zero weights; the covariance of the targets as noise."""
        experts = super().start(y_TN, weight_N, num_leaves, size)
        centred_TN = y_TN - np.average(y_TN, axis=1, weights=weight_N)[:, None]
        square_OO = (weight_N * centred_TN) @ centred_TN.T
        covariance_1OO = self._covariance(square_OO[None], weight_N.sum(keepdims=True))
        return replace(experts, covariance_LOO=covariance_1OO.repeat(num_leaves, axis=0))

    def judge(self, x_PN: Floats, y_TN: Floats, experts: Experts) -> Judgement:
        """Residuals are whitened inside the product with the inputs: one matrix product for all experts."""
        num_leaves, size, outputs = experts.weight_LPO.shape
        root_LOO, whiten_LOO = _roots(experts.covariance_LOO)
        from_x = (experts.weight_LPO @ whiten_LOO).swapaxes(1, 2).reshape(-1, size)
        from_y = whiten_LOO.swapaxes(1, 2).reshape(-1, outputs)
        white_LON = (from_y @ y_TN - from_x @ x_PN).reshape(num_leaves, outputs, -1)
        log_root_L = np.log(np.diagonal(root_LOO, axis1=1, axis2=2)).sum(axis=1)
        constant_L = log_root_L + 0.5 * outputs * np.log(2 * np.pi)
        log_density_LN = -0.5 * (white_LON * white_LON).sum(axis=1) - constant_L[:, None]
        return Judgement(log_density_LN=log_density_LN, signal_LON=white_LON)

    def sums(
        self, x_PN: Floats, product_QN: Floats, y_TN: Floats, weight_LN: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        """The gradient is that of half the squared residuals; `square_LOO` is Sum h r r^T."""
        num_leaves, size, outputs = experts.weight_LPO.shape
        root_LOO, _ = _roots(experts.covariance_LOO)
        weighted_LON = weight_LN[:, None] * judged.signal_LON
        white_LPO = (weighted_LON.reshape(-1, x_PN.shape[1]) @ x_PN.T).reshape(num_leaves, outputs, size).swapaxes(1, 2)
        white_LOO = weighted_LON @ judged.signal_LON.swapaxes(1, 2)
        moments = Moments(
            value_M=(weight_LN * judged.log_density_LN).sum(axis=1),
            gradient_MPO=white_LPO @ root_LOO.swapaxes(1, 2),
            information_MCQ=(weight_LN @ product_QN.T)[:, None],
        )
        square_LOO = root_LOO @ white_LOO @ root_LOO.swapaxes(1, 2)
        return ExpertSums(moments=moments, weight_L=weight_LN.sum(axis=1), square_LOO=square_LOO)

    def maximised(self, experts: Experts, sums: ExpertSums, step_LPO: Floats, ridge_P: Floats) -> Experts:
        """The M-step: weights moved by `step_LPO` (weighted least squares), and the noise that is left.

        Residuals are updated, not formed from raw moments, so that a good fit loses no digits.
        Source: Jordan & Jacobs 1994, eq. 26-28; the noise by its posterior mode.
        """
        weight_LPO = experts.weight_LPO + step_LPO
        size = weight_LPO.shape[1]
        p_Q, q_Q = np.triu_indices(size)
        gram_LPP = np.empty((len(weight_LPO), size, size))
        gram_LPP[:, p_Q, q_Q] = gram_LPP[:, q_Q, p_Q] = sums.moments.information_MCQ[:, 0]
        cross_LOO = step_LPO.swapaxes(1, 2) @ sums.moments.gradient_MPO
        square_LOO = sums.square_LOO - cross_LOO - cross_LOO.swapaxes(1, 2)
        square_LOO += step_LPO.swapaxes(1, 2) @ gram_LPP @ step_LPO
        square_LOO += weight_LPO.swapaxes(1, 2) @ (ridge_P[:, None] * weight_LPO)
        return Experts(weight_LPO=weight_LPO, covariance_LOO=self._covariance(square_LOO, sums.weight_L))

    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        return predictors(x_PN, experts.weight_LPO)

    def log_prior(self, experts: Experts, ridge_P: Floats) -> float:
        """Log prior of weights and noise, up to a constant: what the M-step adds to the log-likelihood."""
        root_LOO, whiten_LOO = _roots(experts.covariance_LOO)
        scatter_LOO = experts.weight_LPO.swapaxes(1, 2) @ (ridge_P[:, None] * experts.weight_LPO)
        scatter_LOO = scatter_LOO + self.noise_rows * self.noise_floor * np.eye(self.outputs)
        log_root_L = np.log(np.diagonal(root_LOO, axis1=1, axis2=2)).sum(axis=1)
        precision_LOO = whiten_LOO @ whiten_LOO.swapaxes(1, 2)
        return float(-0.5 * (precision_LOO * scatter_LOO).sum() - self.noise_rows * log_root_L.sum())

    def _covariance(self, square_LOO: Floats, weight_L: Floats) -> Floats:
        eye_OO = np.eye(self.outputs)
        if self.noise == "unit":
            return np.broadcast_to(eye_OO, square_LOO.shape).copy()
        scatter_LOO = square_LOO + self.noise_rows * self.noise_floor * eye_OO
        return self.shaped(scatter_LOO / (weight_L + self.noise_rows)[:, None, None])

    def shaped(self, covariance_LOO: Floats) -> Floats:
        """The nearest covariances of the form that `noise` names."""
        if self.noise == "full":
            return 0.5 * (covariance_LOO + covariance_LOO.swapaxes(1, 2))
        diagonal_LO = np.diagonal(covariance_LOO, axis1=1, axis2=2)
        if self.noise == "scalar":
            diagonal_LO = diagonal_LO.mean(axis=1, keepdims=True)
        return diagonal_LO[:, :, None] * np.eye(self.outputs)


@dataclass(frozen=True, kw_only=True)
class Softmax(Family):
    """Softmax experts over `targets` classes; the last class's predictor is zero. Two classes: logistic experts."""

    targets: int
    is_closed: ClassVar[bool] = False

    @property
    def outputs(self) -> int:
        return self.targets - 1

    def judge(self, x_PN: Floats, y_TN: Floats, experts: Experts) -> Judgement:
        log_share_LTN = log_softmax_with_last_zero(predictors(x_PN, experts.weight_LPO))
        return Judgement(log_density_LN=(y_TN * log_share_LTN).sum(axis=1), signal_LON=log_share_LTN)

    def sums(
        self, x_PN: Floats, product_QN: Floats, y_TN: Floats, weight_LN: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        mass_LTN = weight_LN[:, None] * y_TN
        return ExpertSums(
            moments=softmax_moments(x_PN, product_QN, judged.signal_LON, mass_LTN),
            weight_L=weight_LN.sum(axis=1),
            square_LOO=experts.covariance_LOO,
        )

    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        return np.exp(log_softmax_with_last_zero(predictors(x_PN, experts.weight_LPO)))


@dataclass(frozen=True, kw_only=True)
class Poisson(Family):
    """Poisson experts with a log link, for counts."""

    targets: int = 1
    is_closed: ClassVar[bool] = False

    @property
    def outputs(self) -> int:
        return 1

    def start(self, y_TN: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """The mean count everywhere: from a rate of one, Newton's first step would be far too long."""
        experts = super().start(y_TN, weight_N, num_leaves, size)
        experts.weight_LPO[:, -1] = np.log(max(float(np.average(y_TN[0], weights=weight_N)), 1e-3))
        return experts

    def judge(self, x_PN: Floats, y_TN: Floats, experts: Experts) -> Judgement:
        log_rate_LN = predictors(x_PN, experts.weight_LPO)[:, 0].clip(-MOST_LOG_RATE, MOST_LOG_RATE)
        rate_LN = np.exp(log_rate_LN)
        return Judgement(log_density_LN=y_TN * log_rate_LN - rate_LN - gammaln(y_TN + 1), signal_LON=rate_LN[:, None])

    def sums(
        self, x_PN: Floats, product_QN: Floats, y_TN: Floats, weight_LN: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        rate_LN = judged.signal_LON[:, 0]
        moments = Moments(
            value_M=(weight_LN * judged.log_density_LN).sum(axis=1),
            gradient_MPO=((weight_LN * (y_TN - rate_LN)) @ x_PN.T)[:, :, None],
            information_MCQ=((weight_LN * rate_LN) @ product_QN.T)[:, None],
        )
        return ExpertSums(moments=moments, weight_L=weight_LN.sum(axis=1), square_LOO=experts.covariance_LOO)

    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        return np.exp(predictors(x_PN, experts.weight_LPO).clip(-MOST_LOG_RATE, MOST_LOG_RATE))


def softmax_moments(x_PN: Floats, product_QN: Floats, log_share_MBN: Floats, mass_MBN: Floats) -> Moments:
    """Moments of M softmax models with `mass_MBN` of each row on each branch; gates and softmax experts are both such.

    Source: Jordan & Jacobs 1994, appendix A (IRLS); the whole Hessian, not its diagonal blocks.
    """
    num_models, branches, num_rows = mass_MBN.shape
    weight_MN = mass_MBN.sum(axis=1)
    share_MBN = np.exp(log_share_MBN)
    score_MON = mass_MBN[:, :-1] - weight_MN[:, None] * share_MBN[:, :-1]
    gradient = score_MON.reshape(-1, num_rows) @ x_PN.T
    information = softmax_curvature(share_MBN, weight_MN).reshape(-1, num_rows) @ product_QN.T
    # a branch of no mass adds nothing, however unlikely it is
    log_mass_MBN = np.where(mass_MBN > 0, log_share_MBN, 0.0) * mass_MBN
    return Moments(
        value_M=log_mass_MBN.sum(axis=(1, 2)),
        gradient_MPO=gradient.reshape(num_models, branches - 1, len(x_PN)).swapaxes(1, 2),
        information_MCQ=information.reshape(num_models, branches * (branches - 1) // 2, len(product_QN)),
    )


def log_softmax_with_last_zero(predictor_MON: Floats) -> Floats:
    """Log shares of O + 1 branches, the last of which has the predictor zero."""
    num_models, _, num_rows = predictor_MON.shape
    full_MBN = np.concatenate([predictor_MON, np.zeros((num_models, 1, num_rows))], axis=1)
    return full_MBN - log_sum_exp(full_MBN, axis=1)[:, None]


def predictors(x_PN: Floats, weight_LPO: Floats) -> Floats:
    num_models, size, outputs = weight_LPO.shape
    return (weight_LPO.swapaxes(1, 2).reshape(-1, size) @ x_PN).reshape(num_models, outputs, x_PN.shape[1])


def _roots(covariance_LOO: Floats) -> tuple[Floats, Floats]:
    """Cholesky factors C of the covariances, and C^-T, which makes residuals (as rows) white."""
    root_LOO = np.linalg.cholesky(covariance_LOO)
    return root_LOO, np.linalg.inv(root_LOO).swapaxes(1, 2)
