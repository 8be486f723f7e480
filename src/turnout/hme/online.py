"""On-line learning: recursive least squares for all experts and gates of a tree, one row at a time."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.families import Experts
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture
from turnout.hme.sweep import LEAST_POSTERIOR, Rows
from turnout.hme.tree import Floats

LEAST_NOISE_ROWS, MOST_NOISE_ROWS = 100.0, 10_000.0  # rows that the running noise of an expert stands for


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Forgetting of the on-line algorithm. Source: Jordan & Jacobs 1994, section 5."""

    forgetting: float = 0.99  # lambda: what a row keeps of the weight of rows before it
    forgets: Literal["own", "all"] = "own"  # all: every row ages every model, as in the paper; own: by its share of it
    settle_rows: int = 1000  # every so many rows lambda moves to 1 by `settle_share` of the way
    settle_share: float = 0.6
    expert_variance: float = 10.0  # of the experts' weights before any row: the inverse of a ridge
    gate_variance: float = 0.01  # of the gates' weights: small, so that first rows do not undo the first partition
    most_variance: float = 1e6  # mean variance a model's weights may reach by forgetting what it never sees again

    def __post_init__(self) -> None:
        if not 0 < self.forgetting <= 1:
            raise ConfigError(f"forgetting={self.forgetting} must be above 0 and at most 1")
        if self.forgets not in ("own", "all"):
            raise ConfigError(f"forgets={self.forgets!r} must be one of: own, all")
        if not (0 <= self.settle_share <= 1 and self.settle_rows >= 1):
            raise ConfigError(
                f"settle_share={self.settle_share} must be 0 to 1 and settle_rows={self.settle_rows} at least 1"
            )
        if not (0 < self.expert_variance <= self.most_variance and 0 < self.gate_variance <= self.most_variance):
            raise ConfigError(
                f"expert_variance={self.expert_variance} and gate_variance={self.gate_variance} must be above 0 and at "
                f"most most_variance={self.most_variance}"
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
        return cls(
            mixture=mixture,
            expert_LPP=np.tile(config.expert_variance * np.eye(size), (mixture.tree.num_leaves, 1, 1)),
            gate_GPP=np.tile(config.gate_variance * np.eye(size), (gates, 1, 1)),
            rows_seen=0,
        )


def learn_rows(state: Recursion, rows: Rows, config: OnlineConfig) -> Recursion:
    """The state after all of `rows`, in their order; a row of weight w counts as w rows.

    Source: Jordan & Jacobs 1994, on-line algorithm, with 1 / h in the denominator as weighted least squares requires.
    """
    for x_P, y_T, weight in zip(rows.x_NP, rows.y_NT, rows.weight_N, strict=True):
        if weight > 0:
            state = _learn_row(state, x_P, y_T, float(weight), config)
    return state


def forgetting_at(rows_seen: int, config: OnlineConfig) -> float:
    """Lambda after so many rows."""
    return 1 - (1 - config.forgetting) * (1 - config.settle_share) ** (rows_seen // config.settle_rows)


def weighted_update(
    inverse_MPP: Floats, x_P: Floats, weight_M: Floats, forgetting_M: Floats | float
) -> tuple[Floats, Floats]:
    """One row of recursive weighted least squares for M models: the gains (M, P) and the new inverses.

    Written without a division by the weight, which may be zero: gain = w R x / (lambda + w x^T R x).
    """
    forgetting_M = np.broadcast_to(forgetting_M, weight_M.shape)
    seen_MP = inverse_MPP @ x_P
    gain_MP = (weight_M / (forgetting_M + weight_M * (seen_MP @ x_P)))[:, None] * seen_MP
    return gain_MP, (inverse_MPP - gain_MP[:, :, None] * seen_MP[:, None, :]) / forgetting_M[:, None, None]


def _learn_row(state: Recursion, x_P: Floats, y_T: Floats, weight: float, config: OnlineConfig) -> Recursion:
    mixture = state.mixture
    posterior = mixture.posterior(x_P[:, None], y_T[:, None])
    leaf_L = weight * posterior.leaf_LN[:, 0]
    mass_GB = (mixture.tree.path_EL @ leaf_L).reshape(mixture.tree.child_GB.shape)
    expert_gain_LP, expert_LPP = _updated(state.expert_LPP, x_P, leaf_L, state.rows_seen, config)
    gate_gain_GP, gate_GPP = _updated(state.gate_GPP, x_P, mass_GB.sum(axis=1), state.rows_seen, config)
    error_LO = y_T - x_P @ mixture.experts.weight_LPO
    experts = Experts(
        weight_LPO=mixture.experts.weight_LPO + expert_gain_LP[:, :, None] * error_LO[:, None, :],
        # the error before times the error after the update is what the row adds to the sum of squares
        covariance_LOO=_noise(mixture, error_LO, leaf_L, np.maximum(1 - expert_gain_LP @ x_P, 0.0), state.rows_seen),
    )
    gate_error_GO = _log_posterior_error(mass_GB, posterior.log_share_GBN[:, :, 0])
    gate_GPO = mixture.gate_GPO + gate_gain_GP[:, :, None] * gate_error_GO[:, None, :]
    return Recursion(
        mixture=replace(mixture, gate_GPO=gate_GPO, experts=experts),
        expert_LPP=expert_LPP,
        gate_GPP=gate_GPP,
        rows_seen=state.rows_seen + 1,
    )


def _updated(
    inverse_MPP: Floats, x_P: Floats, weight_M: Floats, rows_seen: int, config: OnlineConfig
) -> tuple[Floats, Floats]:
    forgetting_M = np.full(len(weight_M), forgetting_at(rows_seen, config))
    if config.forgets == "own":
        # a model ages by the rows it answers for: those of others tell it nothing to take their place
        forgetting_M = forgetting_M ** np.minimum(weight_M, 1.0)
    gain_MP, inverse_MPP = weighted_update(inverse_MPP, x_P, weight_M, forgetting_M)
    mean_M = np.trace(inverse_MPP, axis1=1, axis2=2) / inverse_MPP.shape[1]
    return gain_MP, inverse_MPP * (config.most_variance / np.maximum(mean_M, config.most_variance))[:, None, None]


def _log_posterior_error(mass_GB: Floats, log_share_GB: Floats) -> Floats:
    """Log posteriors minus predictors, both relative to the last branch; zero at closed branches."""
    share_GB = mass_GB / np.maximum(mass_GB.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    target_GB = np.log(np.maximum(share_GB, LEAST_POSTERIOR))
    is_open_GO = np.isfinite(log_share_GB[:, :-1])
    predictor_GO = np.where(is_open_GO, log_share_GB[:, :-1] - log_share_GB[:, -1:], 0.0)
    return np.where(is_open_GO, target_GB[:, :-1] - target_GB[:, -1:] - predictor_GO, 0.0)


def _noise(mixture: Mixture, error_LO: Floats, leaf_L: Floats, after_L: Floats, rows_seen: int) -> Floats:
    """Each covariance moved towards the row's squared error, by the row's share of the rows that it stands for."""
    family, covariance_LOO = mixture.family, mixture.experts.covariance_LOO
    assert isinstance(family, Gaussian)
    if family.noise == "unit":
        return covariance_LOO
    square_LOO = after_L[:, None, None] * error_LO[:, :, None] * error_LO[:, None, :]
    square_LOO = family.shaped(square_LOO) + family.noise_floor * np.eye(family.outputs)
    stands_for = min(LEAST_NOISE_ROWS + rows_seen / len(leaf_L), MOST_NOISE_ROWS)
    rate_L11 = (leaf_L / (leaf_L + stands_for))[:, None, None]
    return covariance_LOO + rate_L11 * (square_LOO - covariance_LOO)
