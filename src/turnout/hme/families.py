"""What an expert says of its rows: families of densities whose parameters are linear in the inputs, all experts at once."""

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

    log_density_NL: Floats
    signal_NLO: Floats  # Gaussian: whitened residuals; softmax: log shares; Poisson: rates


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
    def judge(self, x_NP: Floats, y_NT: Floats, experts: Experts) -> Judgement:
        """Log densities of the targets under each expert, and what `sums` needs."""

    @abstractmethod
    def sums(
        self, x_NP: Floats, product_NQ: Floats, y_NT: Floats, weight_NL: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        """Moments at `experts` with rows weighted by `weight_NL` (posterior times sample weight)."""

    @abstractmethod
    def mean(self, x_NP: Floats, experts: Experts) -> Floats:
        """Expected targets of each expert, (N, L, T)."""

    def start(self, y_NT: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
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

    def start(self, y_NT: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """Zero weights; the covariance of the targets as noise."""
        experts = super().start(y_NT, weight_N, num_leaves, size)
        centred_NT = y_NT - np.average(y_NT, axis=0, weights=weight_N)
        square_OO = (weight_N[:, None] * centred_NT).T @ centred_NT
        covariance_1OO = self._covariance(square_OO[None], weight_N.sum(keepdims=True))
        return replace(experts, covariance_LOO=covariance_1OO.repeat(num_leaves, axis=0))

    def judge(self, x_NP: Floats, y_NT: Floats, experts: Experts) -> Judgement:
        """Residuals are whitened inside the product with the inputs: one matrix product for all experts."""
        num_leaves, size, outputs = experts.weight_LPO.shape
        root_LOO, whiten_LOO = _roots(experts.covariance_LOO)
        from_x = -(experts.weight_LPO @ whiten_LOO).transpose(1, 0, 2).reshape(size, -1)
        from_y = whiten_LOO.transpose(1, 0, 2).reshape(outputs, -1)
        white_NLO = (x_NP @ from_x + y_NT @ from_y).reshape(-1, num_leaves, outputs)
        log_root_L = np.log(np.diagonal(root_LOO, axis1=1, axis2=2)).sum(axis=1)
        square_NL = np.einsum("nlo,nlo->nl", white_NLO, white_NLO)
        log_density_NL = -0.5 * (square_NL + outputs * np.log(2 * np.pi)) - log_root_L
        return Judgement(log_density_NL=log_density_NL, signal_NLO=white_NLO)

    def sums(
        self, x_NP: Floats, product_NQ: Floats, y_NT: Floats, weight_NL: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        """The gradient is that of half the squared residuals; `square_LOO` is Sum h r r^T."""
        num_leaves, size, outputs = experts.weight_LPO.shape
        root_LOO, _ = _roots(experts.covariance_LOO)
        weighted_NLO = weight_NL[:, :, None] * judged.signal_NLO
        white_LPO = (x_NP.T @ weighted_NLO.reshape(len(x_NP), -1)).reshape(size, num_leaves, outputs).swapaxes(0, 1)
        white_LOO = np.einsum("nlo,nlr->lor", weighted_NLO, judged.signal_NLO)
        moments = Moments(
            value_M=np.einsum("nl,nl->l", weight_NL, judged.log_density_NL),
            gradient_MPO=white_LPO @ root_LOO.swapaxes(1, 2),
            information_MCQ=(weight_NL.T @ product_NQ)[:, None],
        )
        square_LOO = root_LOO @ white_LOO @ root_LOO.swapaxes(1, 2)
        return ExpertSums(moments=moments, weight_L=weight_NL.sum(axis=0), square_LOO=square_LOO)

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

    def mean(self, x_NP: Floats, experts: Experts) -> Floats:
        return _predictors(x_NP, experts.weight_LPO)

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
        covariance_LOO = scatter_LOO / (weight_L + self.noise_rows)[:, None, None]
        if self.noise == "full":
            return 0.5 * (covariance_LOO + covariance_LOO.swapaxes(1, 2))
        diagonal_LO = np.diagonal(covariance_LOO, axis1=1, axis2=2)
        if self.noise == "scalar":
            diagonal_LO = diagonal_LO.mean(axis=1, keepdims=True)
        return diagonal_LO[:, :, None] * eye_OO


@dataclass(frozen=True, kw_only=True)
class Softmax(Family):
    """Softmax experts over `targets` classes; the last class's predictor is zero. Two classes: logistic experts."""

    targets: int
    is_closed: ClassVar[bool] = False

    @property
    def outputs(self) -> int:
        return self.targets - 1

    def judge(self, x_NP: Floats, y_NT: Floats, experts: Experts) -> Judgement:
        log_share_NLT = log_softmax_with_last_zero(_predictors(x_NP, experts.weight_LPO))
        return Judgement(log_density_NL=np.einsum("nt,nlt->nl", y_NT, log_share_NLT), signal_NLO=log_share_NLT)

    def sums(
        self, x_NP: Floats, product_NQ: Floats, y_NT: Floats, weight_NL: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        mass_NLT = weight_NL[:, :, None] * y_NT[:, None, :]
        return ExpertSums(
            moments=softmax_moments(x_NP, product_NQ, judged.signal_NLO, mass_NLT),
            weight_L=weight_NL.sum(axis=0),
            square_LOO=experts.covariance_LOO,
        )

    def mean(self, x_NP: Floats, experts: Experts) -> Floats:
        return np.exp(log_softmax_with_last_zero(_predictors(x_NP, experts.weight_LPO)))


@dataclass(frozen=True, kw_only=True)
class Poisson(Family):
    """Poisson experts with a log link, for counts."""

    targets: int = 1
    is_closed: ClassVar[bool] = False

    @property
    def outputs(self) -> int:
        return 1

    def judge(self, x_NP: Floats, y_NT: Floats, experts: Experts) -> Judgement:
        log_rate_NL = _predictors(x_NP, experts.weight_LPO)[:, :, 0].clip(-MOST_LOG_RATE, MOST_LOG_RATE)
        rate_NL = np.exp(log_rate_NL)
        return Judgement(
            log_density_NL=y_NT * log_rate_NL - rate_NL - gammaln(y_NT + 1), signal_NLO=rate_NL[:, :, None]
        )

    def sums(
        self, x_NP: Floats, product_NQ: Floats, y_NT: Floats, weight_NL: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        rate_NL = judged.signal_NLO[:, :, 0]
        moments = Moments(
            value_M=np.einsum("nl,nl->l", weight_NL, judged.log_density_NL),
            gradient_MPO=((weight_NL * (y_NT - rate_NL)).T @ x_NP)[:, :, None],
            information_MCQ=((weight_NL * rate_NL).T @ product_NQ)[:, None],
        )
        return ExpertSums(moments=moments, weight_L=weight_NL.sum(axis=0), square_LOO=experts.covariance_LOO)

    def mean(self, x_NP: Floats, experts: Experts) -> Floats:
        return np.exp(_predictors(x_NP, experts.weight_LPO).clip(-MOST_LOG_RATE, MOST_LOG_RATE))


def softmax_moments(x_NP: Floats, product_NQ: Floats, log_share_NMB: Floats, mass_NMB: Floats) -> Moments:
    """Moments of M softmax models with `mass_NMB` of each row on each branch; gates and softmax experts are both such.

    Source: Jordan & Jacobs 1994, appendix A (IRLS); the whole Hessian, not its diagonal blocks.
    """
    weight_NM = mass_NMB.sum(axis=2)
    share_NMB = np.exp(log_share_NMB)
    num_rows, num_models, branches = mass_NMB.shape
    score_NMO = (mass_NMB - weight_NM[:, :, None] * share_NMB)[:, :, :-1]
    gradient = x_NP.T @ score_NMO.reshape(num_rows, -1)
    curvature_NMC = softmax_curvature(share_NMB, weight_NM)
    information = curvature_NMC.reshape(num_rows, -1).T @ product_NQ
    return Moments(
        value_M=np.einsum("nmb,nmb->m", mass_NMB, np.where(mass_NMB > 0, log_share_NMB, 0.0)),
        gradient_MPO=gradient.reshape(-1, num_models, branches - 1).swapaxes(0, 1),
        information_MCQ=information.reshape(num_models, -1, product_NQ.shape[1]),
    )


def log_softmax_with_last_zero(predictor_NMO: Floats) -> Floats:
    """Log shares of O + 1 branches, the last of which has the predictor zero."""
    full_NMB = np.concatenate([predictor_NMO, np.zeros((*predictor_NMO.shape[:2], 1))], axis=2)
    return full_NMB - log_sum_exp(full_NMB)[:, :, None]


def _predictors(x_NP: Floats, weight_LPO: Floats) -> Floats:
    num_models, size, outputs = weight_LPO.shape
    flat = weight_LPO.transpose(1, 0, 2).reshape(size, -1)
    return (x_NP @ flat).reshape(len(x_NP), num_models, outputs)


def _roots(covariance_LOO: Floats) -> tuple[Floats, Floats]:
    """Cholesky factors C of the covariances, and C^-T, which makes residuals (as rows) white."""
    root_LOO = np.linalg.cholesky(covariance_LOO)
    return root_LOO, np.linalg.inv(root_LOO).swapaxes(1, 2)
