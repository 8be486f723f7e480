"""Linear-Gaussian experts, all at once: residuals made white, weighted least squares, noise of four forms."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.algebra import unpack
from turnout.hme.families import Experts, ExpertSums, Family, Judgement
from turnout.hme.glim import Moments
from turnout.hme.shares import predictors
from turnout.hme.tree import Floats


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

    def __post_init__(self) -> None:
        if self.noise not in ("unit", "scalar", "diagonal", "full"):
            raise ConfigError(f"noise={self.noise!r} must be one of: unit, scalar, diagonal, full")

    @property
    def outputs(self) -> int:
        return self.targets

    @property
    def noise_parameters(self) -> int:
        full = self.outputs * (self.outputs + 1) // 2
        return {"unit": 0, "scalar": 1, "diagonal": self.outputs, "full": full}[self.noise]

    def start(self, y_TN: Floats, weight_N: Floats, num_leaves: int, size: int) -> Experts:
        """Zero weights; the covariance of the targets as noise."""
        centred_TN = y_TN - np.average(y_TN, axis=1, weights=weight_N)[:, None]
        square_OO = (weight_N * centred_TN) @ centred_TN.T
        covariance_1OO = self._covariance(square_OO[None], weight_N.sum(keepdims=True))
        return Experts(
            weight_LPO=np.zeros((num_leaves, size, self.outputs)),
            covariance_LOO=covariance_1OO.repeat(num_leaves, axis=0),
        )

    def judge(self, x_PN: Floats, y_TN: Floats, experts: Experts) -> Judgement:
        """Residuals are whitened inside the product with the inputs: one matrix product for all experts."""
        outputs = experts.weight_LPO.shape[2]
        root_LOO, whiten_LOO = experts.roots
        white_LON = predictors(x_PN, experts.weight_LPO @ whiten_LOO)
        from_y = whiten_LOO.swapaxes(1, 2).reshape(-1, outputs)
        np.subtract((from_y @ y_TN).reshape(white_LON.shape), white_LON, out=white_LON)
        log_density_LN = np.einsum("lon,lon->ln", white_LON, white_LON)
        log_density_LN *= -0.5
        log_density_LN -= (_log_determinant(root_LOO) + 0.5 * outputs * np.log(2 * np.pi))[:, None]
        return Judgement(log_density_LN=log_density_LN, signal_LON=white_LON)

    def sums(
        self, x_PN: Floats, product_QN: Floats, y_TN: Floats, weight_LN: Floats, judged: Judgement, experts: Experts
    ) -> ExpertSums:
        """The gradient is that of half the squared residuals; `square_LOO` sums h r r^T, in the form of the noise."""
        num_leaves, size, outputs = experts.weight_LPO.shape
        root_LOO, _ = experts.roots
        weighted_LON = weight_LN[:, None] * judged.signal_LON
        white_LOP = (weighted_LON.reshape(-1, x_PN.shape[1]) @ x_PN.T).reshape(num_leaves, outputs, size)
        moments = Moments(
            gradient_MPO=white_LOP.swapaxes(1, 2) @ root_LOO.swapaxes(1, 2),
            information_MCQ=(weight_LN @ product_QN.T)[:, None],
        )
        square_LOO = root_LOO @ self._squares(weighted_LON, judged.signal_LON) @ root_LOO.swapaxes(1, 2)
        return ExpertSums(moments=moments, weight_L=weight_LN.sum(axis=1), square_LOO=square_LOO)

    def _squares(self, weighted_LON: Floats, white_LON: Floats) -> Floats:
        """Sums of products of residuals; those of different outputs only where the noise knows of them."""
        if self.noise == "full":
            return weighted_LON @ white_LON.swapaxes(1, 2)
        return np.einsum("lon,lon->lo", weighted_LON, white_LON)[:, :, None] * np.eye(self.outputs)

    def maximised(self, experts: Experts, sums: ExpertSums, step_LPO: Floats, ridge_P: Floats) -> Experts:
        """The M-step: weights moved by `step_LPO` (weighted least squares), and the noise that is left.

        Residuals are updated, not formed from raw moments, so that a good fit loses no digits.
        Source: Jordan & Jacobs 1994, algorithm 1, step 2; the noise by its posterior mode.
        """
        weight_LPO, step_LOP = experts.weight_LPO + step_LPO, step_LPO.swapaxes(1, 2)
        gram_LPP = unpack(sums.moments.information_MCQ[:, 0], weight_LPO.shape[1])
        cross_LOO = step_LOP @ sums.moments.gradient_MPO
        square_LOO = sums.square_LOO - cross_LOO - cross_LOO.swapaxes(1, 2) + step_LOP @ gram_LPP @ step_LPO
        square_LOO += weight_LPO.swapaxes(1, 2) @ (ridge_P[:, None] * weight_LPO)
        return Experts(weight_LPO=weight_LPO, covariance_LOO=self._covariance(square_LOO, sums.weight_L))

    def mean(self, x_PN: Floats, experts: Experts) -> Floats:
        return predictors(x_PN, experts.weight_LPO)

    def log_prior(self, experts: Experts, ridge_P: Floats) -> float:
        """The ridge counts in units of an expert's own noise, so that its weights do not depend on the noise."""
        root_LOO, whiten_LOO = experts.roots
        scatter_LOO = experts.weight_LPO.swapaxes(1, 2) @ (ridge_P[:, None] * experts.weight_LPO)
        scatter_LOO = scatter_LOO + self.noise_rows * self.noise_floor * np.eye(self.outputs)
        precision_LOO = whiten_LOO @ whiten_LOO.swapaxes(1, 2)
        return float(-0.5 * (precision_LOO * scatter_LOO).sum() - self.noise_rows * _log_determinant(root_LOO).sum())

    def shaped(self, covariance_LOO: Floats) -> Floats:
        """The likeliest covariances of the form that `noise` names."""
        if self.noise == "full":
            return 0.5 * (covariance_LOO + covariance_LOO.swapaxes(1, 2))
        diagonal_LO = np.diagonal(covariance_LOO, axis1=1, axis2=2)
        if self.noise == "scalar":
            diagonal_LO = diagonal_LO.mean(axis=1, keepdims=True)
        return diagonal_LO[:, :, None] * np.eye(self.outputs)

    def _covariance(self, square_LOO: Floats, weight_L: Floats) -> Floats:
        eye_OO = np.eye(self.outputs)
        if self.noise == "unit":
            return np.broadcast_to(eye_OO, square_LOO.shape).copy()
        scatter_LOO = square_LOO + self.noise_rows * self.noise_floor * eye_OO
        return self.shaped(scatter_LOO / (weight_L + self.noise_rows)[:, None, None])


def _log_determinant(root_LOO: Floats) -> Floats:
    """Half the log determinants of the covariances with these Cholesky factors."""
    return np.log(np.diagonal(root_LOO, axis1=1, axis2=2)).sum(axis=1)
