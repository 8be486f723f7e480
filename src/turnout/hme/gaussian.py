"""Linear-Gaussian experts, all at once: residuals made white, weighted least squares, noise of four forms."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.algebra import diagonals, unpack
from turnout.hme.families import Experts, ExpertSums, Family, Judgement
from turnout.hme.glim import Slopes
from turnout.hme.shares import predictors
from turnout.hme.space import MakeRoom, space_of
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
    noise_start: float = 1.0  # noise before any iteration, in variances of the targets

    def __post_init__(self) -> None:
        if not (np.isfinite(self.noise_start) and self.noise_start >= self.noise_floor):
            raise ConfigError(
                f"noise_start={self.noise_start} must be a finite number of at least {self.noise_floor:g} "
                "(variances of the targets)"
            )
        if self.noise == "unit" and self.noise_start != 1:
            raise ConfigError(
                f"noise='unit' stays 1, not noise_start={self.noise_start}; choose noise scalar, diagonal or full"
            )
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
        """Zero weights; the covariance of the targets as noise, times `noise_start`."""
        centred_TN = y_TN - np.average(y_TN, axis=1, weights=weight_N)[:, None]
        square_OO = (weight_N * centred_TN) @ centred_TN.T
        covariance_1OO = self._covariance(square_OO[None], weight_N.sum(keepdims=True))
        return Experts(
            weight_LPO=np.zeros((num_leaves, size, self.outputs)),
            covariance_LOO=(self.noise_start * covariance_1OO).repeat(num_leaves, axis=0),
        )

    def weights(self, experts: Experts) -> Floats:
        """Residuals, made white, are linear in inputs and targets."""
        return experts.white_LZO

    def judge(self, predictor_LON: Floats, y_TN: Floats, experts: Experts, make: MakeRoom | None = None) -> Judgement:
        """The predictors are white residuals already."""
        space = space_of(predictor_LON)
        make = make or space.room
        square_LN = make(len(predictor_LON), predictor_LON.shape[2])
        space.einsum("lon,lon->ln", predictor_LON, predictor_LON, out=square_LN)
        most_L = -experts.log_root_L - 0.5 * self.outputs * np.log(2 * np.pi)
        log_density_LN = space.subtract(most_L[:, None], square_LN, out=make(*square_LN.shape))
        return Judgement(log_density_LN=log_density_LN, signal_LON=predictor_LON, square_LN=square_LN)

    def slopes(self, y_TN: Floats, weight_LN: Floats, judged: Judgement, out_LON: Floats) -> Slopes:
        """Of half the squared white residuals; all outputs of an expert share one matrix of inputs."""
        weight_L1N = weight_LN[:, None]
        score_LON = space_of(weight_LN).multiply(weight_L1N, judged.signal_LON, out=out_LON)
        return Slopes(score_MON=score_LON, curvature_MCN=weight_L1N)

    def squares(self, weight_LN: Floats, judged: Judgement) -> Floats:
        """Those of different outputs are summed only where the noise knows of them; else each has the mean of all."""
        white_LON = judged.signal_LON
        if self.noise == "full":
            return (weight_LN[:, None] * white_LON) @ white_LON.swapaxes(1, 2)
        if self.noise == "diagonal":
            square_LO = _row_products(weight_LN[:, None] * white_LON, white_LON)
        else:
            assert judged.square_LN is not None
            square_LO = _row_products(weight_LN, judged.square_LN)[:, None] / self.outputs
        square_LOO = space_of(weight_LN).zeros((len(weight_LN), self.outputs, self.outputs))
        diagonals(square_LOO)[:] = square_LO
        return square_LOO

    def coloured(self, sums: ExpertSums, experts: Experts) -> ExpertSums:
        """The gradient is that of half the squared residuals; `square_LOO` sums h r r^T, in the form of the noise."""
        root_LOO, _ = experts.roots
        colour_LOO = root_LOO.swapaxes(1, 2)
        moments = replace(sums.moments, gradient_MPO=sums.moments.gradient_MPO @ colour_LOO)
        return replace(sums, moments=moments, square_LOO=root_LOO @ sums.square_LOO @ colour_LOO)

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
        _, whiten_LOO = experts.roots
        scatter_LOO = experts.weight_LPO.swapaxes(1, 2) @ (ridge_P[:, None] * experts.weight_LPO)
        scatter_LOO = scatter_LOO + self.noise_rows * self.noise_floor * space_of(whiten_LOO).eye(self.outputs)
        half_precision_LOO = whiten_LOO @ whiten_LOO.swapaxes(1, 2)
        return float(-(half_precision_LOO * scatter_LOO).sum() - self.noise_rows * experts.log_root_L.sum())

    def shaped(self, covariance_LOO: Floats) -> Floats:
        """The likeliest covariances of the form that `noise` names."""
        if self.noise == "full":
            return 0.5 * (covariance_LOO + covariance_LOO.swapaxes(1, 2))
        diagonal_LO = diagonals(covariance_LOO)
        if self.noise == "scalar":
            diagonal_LO = diagonal_LO.mean(axis=1, keepdims=True)
        return diagonal_LO[:, :, None] * space_of(covariance_LOO).eye(self.outputs)

    def _covariance(self, square_LOO: Floats, weight_L: Floats) -> Floats:
        space = space_of(square_LOO)
        eye_OO = space.eye(self.outputs)
        if self.noise == "unit":
            return space.zeros_like(square_LOO) + eye_OO
        scatter_LOO = square_LOO + self.noise_rows * self.noise_floor * eye_OO
        return self.shaped(scatter_LOO / (weight_L + self.noise_rows)[:, None, None])


def _row_products(left: Floats, right: Floats) -> Floats:
    """Inner products along the last axis."""
    return (left[..., None, :] @ right[..., :, None])[..., 0, 0]
