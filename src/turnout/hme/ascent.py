"""Gradient ascent, on the likelihood or on one of the three error functions of 1991."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.em import Fit, ridge_of
from turnout.hme.families import Experts, Gaussian
from turnout.hme.local_errors import ERRORS
from turnout.hme.mixture import Mixture
from turnout.hme.sweep import Block, Rows, loglik
from turnout.hme.tree import Floats


@dataclass(frozen=True, kw_only=True)
class AscentConfig:
    """How gradient ascent runs; the gradient is a mean over the rows of a batch."""

    error: str = "mixture"  # mixture: the likelihood; cooperation, competition: of 1991, Gaussian experts alone
    learning_rate: float = 0.1  # rho
    momentum: float = 0.9
    batch_size: int = 32  # rows of a step
    max_iter: int = 100  # passes over the rows
    tol: float = 1e-5  # stop when ten passes gain less than this, in nats a row
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        ERRORS[self.error]
        if not (self.learning_rate > 0 and 0 <= self.momentum < 1 and self.batch_size >= 1 and self.max_iter >= 1):
            raise ConfigError(
                f"learning_rate={self.learning_rate} must be above 0, momentum={self.momentum} from 0 to below 1, "
                f"batch_size={self.batch_size} and max_iter={self.max_iter} at least 1"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradient:
    """Ascent directions of the objective (log-likelihood, or minus an error), summed over rows."""

    value: float
    gate_GPO: Floats
    weight_LPO: Floats
    log_noise_L: Floats  # by the log of the noise's deviation, for scalar noise; zero otherwise


def gradient(mixture: Mixture, block: Block, error: str = "mixture") -> Gradient:
    """The gradient of all gates and experts at once.

    Source: Jordan & Jacobs 1994, eq. 12-15; Jacobs et al. 1991, eq. 1.1-1.3.
    """
    pull = ERRORS[error](mixture, block)
    gates, branches = mixture.tree.child_GB.shape
    mass_GBN = (mixture.tree.path_EL @ pull.log_prior_LN).reshape(gates, branches, block.x_PN.shape[1])
    score_GON = (mass_GBN - mass_GBN.sum(axis=1, keepdims=True) * np.exp(pull.log_share_GBN))[:, :-1]
    score_GON = np.where(mixture.tree.open_GB[:, :-1, None], score_GON, 0.0)
    return Gradient(
        value=pull.value,
        gate_GPO=_by_inputs(score_GON, block.x_PN),
        weight_LPO=_by_inputs(pull.predictor_LON, block.x_PN),
        log_noise_L=pull.log_noise_L,
    )


def fit_ascent(
    mixture: Mixture,
    rows: Rows,
    config: AscentConfig,
    random: np.random.Generator,
    watch: Callable[[int, float], None] | None = None,
    *,
    keep_last: bool = False,
) -> Fit:
    """Stochastic gradient ascent with momentum over random batches.

    Returns the likeliest mixture after a pass, or the last one if `keep_last` (on-line: rows are no measure of rows
    to come).
    """
    total, best, path = float(rows.weight_N.sum()), mixture, [loglik(rows, mixture)]
    speed = (np.zeros_like(mixture.gate_GPO), np.zeros_like(mixture.experts.weight_LPO), 0.0)
    for iteration in range(config.max_iter):
        for chosen in np.array_split(random.permutation(len(rows)), max(1, len(rows) // config.batch_size)):
            block = Block(x_PN=rows.x_NP[chosen].T, y_TN=rows.y_NT[chosen].T, weight_N=rows.weight_N[chosen])
            mixture, speed = _stepped(mixture, block, speed, config, len(rows) / total)
        path.append(loglik(rows, mixture))
        best = mixture if keep_last or path[-1] >= max(path) else best
        if watch is not None:
            watch(iteration + 1, path[-1] / total)
        if len(path) > 10 and abs(path[-1] - path[-11]) < config.tol * total:
            break
    return Fit(
        mixture=best, loglik_path=tuple(path), objective_path=tuple(path), passes=len(path) - 1,
        converged=len(path) <= config.max_iter,
    )  # fmt: skip


def _stepped(
    mixture: Mixture, block: Block, speed: tuple[Floats, Floats, Floats | float], config: AscentConfig, unit: float
) -> tuple[Mixture, tuple[Floats, Floats, Floats | float]]:
    found = gradient(mixture, block, config.error)
    ridge_P1 = ridge_of(config.ridge, block.x_PN.shape[0])[:, None] * (block.x_PN.shape[1] / 1000)
    pulls = (
        found.gate_GPO - ridge_P1 * mixture.gate_GPO,
        found.weight_LPO - ridge_P1 * mixture.experts.weight_LPO,
        found.log_noise_L,
    )
    rate = config.learning_rate * unit / block.x_PN.shape[1]
    speed_G, speed_L, speed_noise = (
        config.momentum * old + _clipped(rate * pull) for old, pull in zip(speed, pulls, strict=True)
    )
    experts = Experts(
        weight_LPO=mixture.experts.weight_LPO + speed_L,
        covariance_LOO=_scaled_noise(mixture, np.asarray(speed_noise)),
    )
    moved = replace(mixture, gate_GPO=mixture.gate_GPO + speed_G, experts=experts)
    return moved, (speed_G, speed_L, speed_noise)


def _scaled_noise(mixture: Mixture, log_noise_L: Floats) -> Floats:
    covariance_LOO = mixture.experts.covariance_LOO
    if not isinstance(mixture.family, Gaussian) or mixture.family.noise == "unit":
        return covariance_LOO
    scaled_LOO = covariance_LOO * np.exp(2 * log_noise_L)[:, None, None]
    # the noise prior's floor, without which a fit of single rows would go to zero
    lowest_L = np.diagonal(scaled_LOO, axis1=1, axis2=2).min(axis=1)
    return scaled_LOO * np.maximum(1.0, mixture.family.noise_floor / lowest_L)[:, None, None]


def _clipped(step: Floats, longest: float = 0.5) -> Floats:
    """No step moves a parameter by more than this, in units of standardized inputs."""
    return np.clip(step, -longest, longest)


def _by_inputs(score_MON: Floats, x_PN: Floats) -> Floats:
    models, outputs, num_rows = score_MON.shape
    return (score_MON.reshape(-1, num_rows) @ x_PN.T).reshape(models, outputs, len(x_PN)).swapaxes(1, 2)
