"""Gradient ascent, on the likelihood or on one of the three error functions of 1991."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.em import Fit, ridge_of
from turnout.hme.families import Experts
from turnout.hme.gaussian import Gaussian
from turnout.hme.local_errors import ERRORS
from turnout.hme.mixture import Mixture
from turnout.hme.paths import branch_mass, leaf_nodes
from turnout.hme.sweep import Block, Rows, loglik, sweep
from turnout.hme.tree import Floats


@dataclass(frozen=True, kw_only=True)
class AscentConfig:
    """How gradient ascent runs; the gradient is a mean over the rows of a batch."""

    error: str = "mixture"  # mixture: the likelihood; cooperation, competition: of 1991, Gaussian experts alone
    learning_rate: float = 0.02  # rho, of a mean over the rows of a batch
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
    mass_GON, mass_G1N = branch_mass(mixture.tree, leaf_nodes(mixture.tree, pull.log_prior_LN))
    score_GON = mass_GON - mass_G1N * pull.shares.free_MON
    return Gradient(
        value=pull.value,
        gate_GPO=_by_inputs(score_GON, block.x_PN),
        weight_LPO=_by_inputs(pull.predictor_LON, block.x_PN),
        log_noise_L=pull.log_noise_L,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Speed:
    """What every parameter moves in a step, momentum included."""

    gate_GPO: Floats
    weight_LPO: Floats
    log_noise_L: Floats

    @classmethod
    def zero(cls, mixture: Mixture) -> "Speed":
        return cls(
            gate_GPO=np.zeros_like(mixture.gate_GPO),
            weight_LPO=np.zeros_like(mixture.experts.weight_LPO),
            log_noise_L=np.zeros(mixture.tree.num_leaves),
        )

    def pushed(self, mixture: Mixture, found: Gradient, rate: float, decay_P1: Floats, momentum: float) -> "Speed":
        """After the push of a batch's gradient: a step takes `rate` of it and `decay_P1` of the weights."""
        gate_push = rate * found.gate_GPO - decay_P1 * mixture.gate_GPO
        weight_push = rate * found.weight_LPO - decay_P1 * mixture.experts.weight_LPO
        return Speed(
            gate_GPO=momentum * self.gate_GPO + _bounded(gate_push),
            weight_LPO=momentum * self.weight_LPO + _bounded(weight_push),
            log_noise_L=momentum * self.log_noise_L + _bounded(0.5 * rate * found.log_noise_L),
        )

    def moved(self, mixture: Mixture) -> Mixture:
        experts = Experts(
            weight_LPO=mixture.experts.weight_LPO + self.weight_LPO,
            covariance_LOO=_scaled_noise(mixture, self.log_noise_L),
        )
        return replace(mixture, gate_GPO=mixture.gate_GPO + self.gate_GPO, experts=experts)


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

    Returns the best mixture after a pass by the error that is fitted, or the last one if `keep_last` (on-line: rows
    are no measure of rows to come). Errors that know no noise get theirs from the residuals at the end.
    """
    total, speed = float(rows.weight_N.sum()), Speed.zero(mixture)
    # the ridge counts in rows, as weights do; no step takes more than the weights themselves
    decay_P1 = np.minimum(1.0, config.learning_rate * ridge_of(config.ridge, rows.num_inputs)[:, None] / total)
    best, values, logliks = mixture, [value(rows, mixture, config.error)], [loglik(rows, mixture)]
    for iteration in range(config.max_iter):
        for chosen in np.array_split(random.permutation(len(rows)), max(1, len(rows) // config.batch_size)):
            block = rows.block(chosen)
            found = natural(mixture, gradient(mixture, block, config.error), config.error)
            rate = config.learning_rate * len(rows) / (total * len(chosen))
            speed = speed.pushed(mixture, found, rate, decay_P1, config.momentum)
            mixture = speed.moved(mixture)
        values.append(value(rows, mixture, config.error))
        logliks.append(loglik(rows, mixture))
        best = mixture if keep_last or values[-1] >= max(values) else best
        if watch is not None:
            watch(iteration + 1, values[-1] / total)
        if len(values) > 10 and abs(values[-1] - values[-11]) < config.tol * total:
            break
    return Fit(
        mixture=best if config.error == "mixture" else with_noise(best, rows),
        loglik_path=tuple(logliks),
        objective_path=tuple(values),
        passes=len(values) - 1,
        converged=len(values) <= config.max_iter,
    )


def natural(mixture: Mixture, found: Gradient, error: str) -> Gradient:
    """The likelihood's gradient in units of each Gaussian expert's own noise, others as they are.

    With it a step is that of the paper's unit variance, and does not grow as the noise falls.
    """
    if error != "mixture" or not isinstance(mixture.family, Gaussian):
        return found
    return replace(found, weight_LPO=found.weight_LPO @ mixture.experts.covariance_LOO)


def value(rows: Rows, mixture: Mixture, error: str) -> float:
    """Minus the error (or the log-likelihood) of all rows."""
    return sum(ERRORS[error](mixture, block).value for block in rows.blocks(mixture))


def with_noise(mixture: Mixture, rows: Rows) -> Mixture:
    """The same Gaussian experts with the noise that their residuals have, weights as they are."""
    assert isinstance(mixture.family, Gaussian)
    weight_LPO = mixture.experts.weight_LPO
    no_step_LPO, no_ridge_P = np.zeros_like(weight_LPO), np.zeros(weight_LPO.shape[1])
    sums = sweep(rows, mixture).experts
    return replace(mixture, experts=mixture.family.maximised(mixture.experts, sums, no_step_LPO, no_ridge_P))


def _scaled_noise(mixture: Mixture, log_noise_L: Floats) -> Floats:
    covariance_LOO = mixture.experts.covariance_LOO
    if not isinstance(mixture.family, Gaussian) or mixture.family.noise == "unit":
        return covariance_LOO
    scaled_LOO = covariance_LOO * np.exp(2 * log_noise_L)[:, None, None]
    # the noise prior's floor, without which a fit of single rows would go to zero
    lowest_L = np.diagonal(scaled_LOO, axis1=1, axis2=2).min(axis=1)
    return scaled_LOO * np.maximum(1.0, mixture.family.noise_floor / lowest_L)[:, None, None]


def _bounded(step: Floats, longest: float = 0.25) -> Floats:
    """No push moves a parameter by more than this, in units of standardized inputs."""
    return np.clip(step, -longest, longest)


def _by_inputs(score_MON: Floats, x_PN: Floats) -> Floats:
    models, outputs, num_rows = score_MON.shape
    return (score_MON.reshape(-1, num_rows) @ x_PN.T).reshape(models, outputs, len(x_PN)).swapaxes(1, 2)
