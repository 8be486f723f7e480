"""The EM algorithm: algorithm 1 (IRLS gates) and algorithm 2 (least squares on log posteriors)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.gaussian import Gaussian
from turnout.hme.glim import GAINED, climbed, newton_step
from turnout.hme.mixture import Mixture
from turnout.hme.sweep import Rows, Sums, longest_move, sweep
from turnout.hme.tree import Floats


@dataclass(frozen=True, kw_only=True)
class EMConfig:
    """How EM runs.

    An iteration takes `newton_steps` passes over the rows, fewer where a step has nothing left to gain; with one step,
    the pass that measures a likelihood is the pass that the next M-step is made of.
    """

    algorithm: Literal[1, 2] = 1  # 1: IRLS gates; 2: gates by least squares on log posteriors
    max_iter: int = 100  # most iterations
    tol: float = 1e-5  # stop when an iteration gains less than this, in nats a row; 0: never
    newton_steps: int = 1  # most damped Newton steps of an M-step; 50 is exact to rounding
    ridge: float = 1e-3  # pull of all weights to zero, in rows of a standardized input
    hold_noise: int = 0  # first iterations in which Gaussian noise stays as it started: fewer where they gain nothing

    def __post_init__(self) -> None:
        if self.algorithm not in (1, 2):
            raise ConfigError(f"algorithm={self.algorithm} must be 1 or 2")
        if self.max_iter < 1 or self.newton_steps < 1:
            raise ConfigError(f"max_iter={self.max_iter} and newton_steps={self.newton_steps} must be at least 1")
        if self.hold_noise < 0:
            raise ConfigError(f"hold_noise={self.hold_noise} must be at least 0 iterations")
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

    `watch` is told the iteration and its objective a row. While noise is held, experts compete by squared error in one
    unit, and the wide noise of the start keeps posteriors soft: a partition of rows forms before experts that fit their
    few rows closely repel all others. Weights alone are maximised then, which is EM still, and cannot fall.
    Source: Jordan & Jacobs 1994 (unit noise throughout); Ueda & Nakano 1998, "Deterministic annealing EM algorithm".
    """
    ridge_P = ridge_of(config.ridge, rows.num_inputs)
    total_weight = float(rows.weight_N.sum())
    logliks, objectives, passes = [], [], 0
    converged, held = False, config.hold_noise
    rows, asked = rows.held_for(mixture), mixture.tree
    tree, gate_G, leaf_L = asked.abreast()
    best = mixture = mixture.renumbered(tree, gate_G, leaf_L)
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
        if converged and iteration < held:
            converged, held = False, iteration
        if converged or iteration == config.max_iter:
            break
        noise_LOO = mixture.experts.covariance_LOO
        mixture, taken = _maximised(mixture, rows, sums, config)
        if iteration < held:
            mixture = replace(mixture, experts=replace(mixture.experts, covariance_LOO=noise_LOO))
        passes += taken
    best = best.renumbered(asked, np.argsort(gate_G), np.argsort(leaf_L))
    return Fit(
        mixture=best, loglik_path=tuple(logliks), objective_path=tuple(objectives), passes=passes, converged=converged
    )


def _maximised(believed: Mixture, rows: Rows, sums: Sums, config: EMConfig) -> tuple[Mixture, int]:
    """The M-step, and the passes it took beyond the one that gave `sums`."""
    enough = GAINED * float(rows.weight_N.sum())
    at, promise = _stepped(believed, rows, sums, config, enough=enough)
    for passes in range(config.newton_steps - 1):
        if promise <= enough:
            return at, passes
        further = sweep(rows, believed, at, log_posteriors=config.algorithm == 2)
        at, promise = _stepped(at, rows, further, config, enough=enough)
    return at, config.newton_steps - 1


def _stepped(at: Mixture, rows: Rows, sums: Sums, config: EMConfig, *, enough: float) -> tuple[Mixture, float]:
    """All gates and experts after a step from `at`, and the most that a model had to gain by it, in nats.

    Least squares (Gaussian experts, gates of algorithm 2) is done in one step, and leaves nothing to gain.
    """
    ridge_P = ridge_of(config.ridge, rows.num_inputs)

    def move(step_MPO: Floats) -> Floats:
        return longest_move(rows, at, step_MPO)

    if config.algorithm == 2:
        gate_GPO = at.gate_GPO + newton_step(sums.gates.with_ridge(at.gate_GPO, ridge_P), ridge_P)
        promise = 0.0
    else:
        gate_GPO, promise = climbed(at.gate_GPO, sums.gates, ridge_P, move, enough)
    moments, weight_LPO = sums.experts.moments, at.experts.weight_LPO
    if isinstance(at.family, Gaussian):
        step_LPO = newton_step(moments.with_ridge(weight_LPO, ridge_P), ridge_P)
        experts = at.family.maximised(at.experts, sums.experts, step_LPO, ridge_P)
    else:
        weight_LPO, expert_promise = climbed(weight_LPO, moments, ridge_P, move, enough)
        experts, promise = replace(at.experts, weight_LPO=weight_LPO), max(promise, expert_promise)
    return replace(at, gate_GPO=gate_GPO, experts=experts), promise
