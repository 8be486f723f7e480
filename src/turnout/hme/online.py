"""On-line learning: recursive least squares for all experts and gates of a tree, one row at a time."""

from dataclasses import dataclass, replace

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.families import Experts, Gaussian
from turnout.hme.mixture import Mixture
from turnout.hme.sweep import LEAST_POSTERIOR, Rows
from turnout.hme.tree import Floats


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Forgetting of the on-line algorithm. Source: Jordan & Jacobs 1994, section on the on-line algorithm."""

    forgetting: float = 0.99  # lambda: what a row keeps of the weight of all rows before it
    settle_rows: int = 1000  # every so many rows lambda moves to 1 by `settle_share` of the way
    settle_share: float = 0.6
    start_variance: float = 1e3  # of the weights, before any row: the inverse of a ridge
    most_variance: float = 1e6  # mean variance a model's weights may reach by forgetting what it never sees again

    def __post_init__(self) -> None:
        if not 0 < self.forgetting <= 1:
            raise ConfigError(f"forgetting={self.forgetting} must be above 0 and at most 1")
        if not (0 <= self.settle_share <= 1 and self.settle_rows >= 1):
            raise ConfigError(
                f"settle_share={self.settle_share} must be 0 to 1 and settle_rows={self.settle_rows} at least 1"
            )
        if not 0 < self.start_variance <= self.most_variance:
            raise ConfigError(
                f"start_variance={self.start_variance} must be above 0 and at most most_variance={self.most_variance}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Recursion:
    """State of the on-line algorithm: inverse information of each expert and each gate, and the rows seen."""

    mixture: Mixture
    expert_LPP: Floats
    gate_GPP: Floats  # branches of a gate share it: their rows have the same weight
    rows_seen: int

    @classmethod
    def start(cls, mixture: Mixture, config: OnlineConfig) -> "Recursion":
        """Raises: ConfigError unless the experts are Gaussian: only they have recursive least squares."""
        if not isinstance(mixture.family, Gaussian):
            raise ConfigError("on-line recursive least squares needs Gaussian experts; use solver='gradient'")
        gates, size, _ = mixture.gate_GPO.shape
        eye_PP = config.start_variance * np.eye(size)
        return cls(
            mixture=mixture,
            expert_LPP=np.tile(eye_PP, (mixture.tree.num_leaves, 1, 1)),
            gate_GPP=np.tile(eye_PP, (gates, 1, 1)),
            rows_seen=0,
        )


def learn_rows(state: Recursion, rows: Rows, config: OnlineConfig) -> Recursion:
    """The state after all of `rows`, in their order; a row of weight w counts as w rows.

    Source: Jordan & Jacobs 1994, eq. 31-34, with 1 / h in the denominator as weighted least squares requires.
    """
    for x_P, y_T, weight in zip(rows.x_NP, rows.y_NT, rows.weight_N, strict=True):
        if weight > 0:
            state = _learn_row(state, x_P, y_T, float(weight), config)
    return state


def forgetting_at(rows_seen: int, config: OnlineConfig) -> float:
    """Lambda after so many rows."""
    return 1 - (1 - config.forgetting) * (1 - config.settle_share) ** (rows_seen // config.settle_rows)


def weighted_update(inverse_MPP: Floats, x_P: Floats, weight_M: Floats, forgetting: float) -> tuple[Floats, Floats]:
    """One row of recursive weighted least squares for M models: the gains (M, P) and the new inverses.

    Written without a division by the weight, which may be zero: gain = w R x / (lambda + w x^T R x).
    """
    seen_MP = inverse_MPP @ x_P
    gain_MP = (weight_M / (forgetting + weight_M * (seen_MP @ x_P)))[:, None] * seen_MP
    return gain_MP, (inverse_MPP - gain_MP[:, :, None] * seen_MP[:, None, :]) / forgetting


def _learn_row(state: Recursion, x_P: Floats, y_T: Floats, weight: float, config: OnlineConfig) -> Recursion:
    mixture, forgetting = state.mixture, forgetting_at(state.rows_seen, config)
    posterior = mixture.posterior(x_P[:, None], y_T[:, None])
    leaf_L = weight * posterior.leaf_LN[:, 0]
    mass_GB = (mixture.tree.path_EL @ leaf_L).reshape(mixture.tree.child_GB.shape)
    expert_gain_LP, expert_LPP = weighted_update(state.expert_LPP, x_P, leaf_L, forgetting)
    gate_gain_GP, gate_GPP = weighted_update(state.gate_GPP, x_P, mass_GB.sum(axis=1), forgetting)
    error_LO = y_T - x_P @ mixture.experts.weight_LPO
    experts = Experts(
        weight_LPO=mixture.experts.weight_LPO + expert_gain_LP[:, :, None] * error_LO[:, None, :],
        covariance_LOO=_noise(mixture, error_LO, leaf_L, x_P, expert_gain_LP, state.rows_seen),
    )
    gate_error_GO = _log_posterior_error(mass_GB, posterior.log_share_GBN[:, :, 0])
    gate_GPO = mixture.gate_GPO + gate_gain_GP[:, :, None] * gate_error_GO[:, None, :]
    return Recursion(
        mixture=replace(mixture, gate_GPO=gate_GPO, experts=experts),
        expert_LPP=_bounded(expert_LPP, config.most_variance),
        gate_GPP=_bounded(gate_GPP, config.most_variance),
        rows_seen=state.rows_seen + 1,
    )


def _log_posterior_error(mass_GB: Floats, log_share_GB: Floats) -> Floats:
    """Log posteriors minus predictors, both relative to the last branch; zero at closed branches."""
    share_GB = mass_GB / np.maximum(mass_GB.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    target_GB = np.log(np.maximum(share_GB, LEAST_POSTERIOR))
    is_open_GO = np.isfinite(log_share_GB[:, :-1])
    predictor_GO = np.where(is_open_GO, log_share_GB[:, :-1] - log_share_GB[:, -1:], 0.0)
    return np.where(is_open_GO, target_GB[:, :-1] - target_GB[:, -1:] - predictor_GO, 0.0)


def _noise(mixture: Mixture, error_LO: Floats, leaf_L: Floats, x_P: Floats, gain_LP: Floats, rows_seen: int) -> Floats:
    """Each covariance moved towards the row's squared error, by the row's share of the rows that it stands for.

    The error before times the error after the update is what recursive least squares adds to the sum of squares.
    """
    family = mixture.family
    assert isinstance(family, Gaussian)
    covariance_LOO = mixture.experts.covariance_LOO
    if family.noise == "unit":
        return covariance_LOO
    after_L = np.maximum(1 - gain_LP @ x_P, 0.0)
    square_LOO = after_L[:, None, None] * error_LO[:, :, None] * error_LO[:, None, :]
    rate_L = leaf_L / (leaf_L + min(100.0 + rows_seen / len(leaf_L), 10_000.0))
    moved_LOO = covariance_LOO + rate_L[:, None, None] * (family.shaped(square_LOO) - covariance_LOO)
    return moved_LOO + rate_L[:, None, None] * family.noise_floor * np.eye(family.outputs)


def _bounded(inverse_MPP: Floats, most: float) -> Floats:
    """Scaled down where forgetting has let it grow without rows to hold it, and kept symmetric."""
    mean_M = np.trace(inverse_MPP, axis1=1, axis2=2) / inverse_MPP.shape[1]
    return inverse_MPP * (most / np.maximum(mean_M, most))[:, None, None]
