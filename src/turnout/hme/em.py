"""The EM algorithm: algorithm 1 (IRLS gates) and algorithm 2 (least squares on log posteriors)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.gaussian import Gaussian
from turnout.hme.glim import GAINED, Climb
from turnout.hme.mixture import Mixture
from turnout.hme.sweep import Rows, Sums, gate_sweep, gate_values, sweep
from turnout.hme.tree import Floats

MOST_HALVINGS = 10  # further passes for models whose step was too long


@dataclass(frozen=True, kw_only=True)
class EMConfig:
    """How EM runs.

    An iteration with n Newton steps takes n + 1 passes over the rows, and more where a step must be halved; one of
    algorithm 2 takes one pass.
    """

    algorithm: Literal[1, 2] = 1  # 1: IRLS gates; 2: gates by least squares on log posteriors
    max_iter: int = 100  # most iterations
    tol: float = 1e-5  # stop when an iteration gains less than this, in nats a row; 0: never
    newton_steps: int = 1  # most damped Newton steps of an M-step; 25 is exact to rounding
    ridge: float = 1e-3  # pull of all weights to zero, in rows of a standardized input

    def __post_init__(self) -> None:
        if self.algorithm not in (1, 2):
            raise ConfigError(f"algorithm={self.algorithm} must be 1 or 2")
        if self.max_iter < 1 or self.newton_steps < 1:
            raise ConfigError(f"max_iter={self.max_iter} and newton_steps={self.newton_steps} must be at least 1")
        if not (self.ridge >= 0 and self.tol >= 0):
            raise ConfigError(f"ridge={self.ridge} and tol={self.tol} must be at least 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A fitted mixture and the way to it."""

    mixture: Mixture
    loglik_path: tuple[float, ...]  # log-likelihood before each iteration and after the last, in nats
    objective_path: tuple[float, ...]  # the same with the log prior, which EM never lowers
    passes: int  # over the rows
    converged: bool


def ridge_of(ridge: float, size: int) -> Floats:
    """The ridge of each input; the constant, which has no unit, gets a thousandth of it."""
    return np.append(np.full(size - 1, ridge), 1e-3 * ridge)


def fit_em(
    mixture: Mixture,
    rows: Rows,
    config: EMConfig,
    watch: Callable[[int, float], None] | None = None,
    *,
    keep_last: bool = False,
) -> Fit:
    """EM from `mixture` on; algorithm 2, which may fall, returns the best mixture it met unless `keep_last`.

    `watch` is told the iteration and its objective a row.
    """
    ridge_P = ridge_of(config.ridge, rows.x_NP.shape[1])
    total_weight = float(rows.weight_N.sum())
    logliks, objectives, passes = [], [], 0
    best, converged = mixture, False
    for iteration in range(config.max_iter + 1):
        sums = sweep(rows, mixture, log_posteriors=config.algorithm == 2)
        passes += 1
        logliks.append(sums.loglik)
        objectives.append(sums.loglik + mixture.log_prior(ridge_P))
        if watch is not None:
            watch(iteration, objectives[-1] / total_weight)
        best = mixture if keep_last or objectives[-1] >= max(objectives) else best
        # the first iteration leaves experts that are all alike, and may gain nothing by it
        gained = objectives[-1] - objectives[-2] if iteration > 1 else np.inf
        converged = abs(gained) < config.tol * total_weight
        if converged or iteration == config.max_iter:
            break
        mixture, taken = _maximised(mixture, rows, sums, config, ridge_P)
        passes += taken
    return Fit(
        mixture=best, loglik_path=tuple(logliks), objective_path=tuple(objectives), passes=passes, converged=converged
    )


def _maximised(mixture: Mixture, rows: Rows, sums: Sums, config: EMConfig, ridge_P: Floats) -> tuple[Mixture, int]:
    """The M-step, and the passes it took beyond the one that gave `sums`."""
    gates = Climb.start(mixture.gate_GPO, sums.gates, ridge_P)
    if config.algorithm == 2:
        # least squares is done in one step, and has no likelihood to climb
        gates = gates.arrived()
    experts = Climb.start(mixture.experts.weight_LPO, sums.experts.moments, ridge_P)
    if isinstance(mixture.family, Gaussian):
        maximal = mixture.family.maximised(mixture.experts, sums.experts, experts.step_MPO, ridge_P)
        gates, taken = _climbed_gates(mixture, rows, gates, config.newton_steps, ridge_P)
    else:
        gates, experts, taken = _climbed_both(mixture, rows, gates, experts, config.newton_steps, ridge_P)
        maximal = replace(mixture.experts, weight_LPO=experts.weight_MPO)
    return replace(mixture, gate_GPO=gates.weight_MPO, experts=maximal), taken


def _climbed_gates(mixture: Mixture, rows: Rows, gates: Climb, steps: int, ridge_P: Floats) -> tuple[Climb, int]:
    """The gates after `steps` Newton steps, and the passes these took; the last step needs no moments of its own."""
    enough, taken = GAINED * float(rows.weight_N.sum()), 0
    while gates.promise > enough and taken < steps - 1:
        gates, taken = gates.judged(gate_sweep(rows, mixture, gates.trial_MPO), ridge_P), taken + 1
    while gates.promise > enough and taken < steps + MOST_HALVINGS:
        gates, taken = gates.settled(gate_values(rows, mixture, gates.trial_MPO), ridge_P), taken + 1
    return gates, taken


def _climbed_both(
    mixture: Mixture, rows: Rows, gates: Climb, experts: Climb, steps: int, ridge_P: Floats
) -> tuple[Climb, Climb, int]:
    """Gates and experts after `steps` Newton steps in common passes, and the number of these."""
    enough, taken = GAINED * float(rows.weight_N.sum()), 0
    while max(gates.promise, experts.promise) > enough:
        if taken >= steps + MOST_HALVINGS * (gates.fell(enough) or experts.fell(enough)):
            break
        tried = replace(mixture.experts, weight_LPO=experts.trial_MPO)
        found = sweep(rows, mixture, replace(mixture, gate_GPO=gates.trial_MPO, experts=tried))
        gates, experts = gates.judged(found.gates, ridge_P), experts.judged(found.experts.moments, ridge_P)
        taken += 1
    return gates, experts, taken
