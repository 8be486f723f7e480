"""On-line learning: recursive least squares, and its twin for gates and classes, a few rows at a time.

Written with the information matrix I (the inverse of the paper's R): I <- lambda I + sum of h x x^T, and
weights <- weights + I^-1 sum of h (y - mu) x. For Gaussian experts that is recursive weighted least squares to the
letter; with the curvature of a softmax or of a rate beside h it is the recursive Newton step of every other family.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from turnout.errors import ConfigError
from turnout.hme.algebra import pairs
from turnout.hme.families import Experts, ExpertSums
from turnout.hme.gaussian import Gaussian
from turnout.hme.glim import Moments, newton_step, safe_share, spread
from turnout.hme.mixture import Mixture
from turnout.hme.rows import Block, Rows
from turnout.hme.shares import predictors
from turnout.hme.space import NUMPY
from turnout.hme.sweep import Sums, gathered, sweep
from turnout.hme.tree import Floats
from turnout.hme.workspace import Workspace

LEAST_NOISE_ROWS, MOST_NOISE_ROWS = 100.0, 10_000.0  # rows that the running noise of an expert stands for


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Forgetting and caution of the on-line algorithm.

    The paper lets lambda settle by 0.6 of the way every 1,000 rows: then rows of the first, poor partition are never
    forgotten. Source: Jordan & Jacobs 1994, section 5.
    """

    forgetting: float = 0.99  # lambda: what a row keeps of the weight of rows before it
    forgets: Literal["own", "all"] = "own"  # all: every row ages every model, as in the paper; own: by its share of it
    settle_rows: int = 1000  # every so many rows lambda moves to 1 by `settle_share` of the way
    settle_share: float = 0.03  # 0.6 in the paper
    gates: Literal["newton", "log_posteriors"] = "newton"  # log_posteriors: least squares on them, as in the paper
    block_rows: int = 32  # rows learned from at once; 1: the paper's recursion
    expert_variance: float = 10.0  # of the experts' weights before any row: the inverse of a ridge
    gate_variance: float = 1.0  # of the gates' weights: the smaller, the longer the first partition stands
    most_variance: float = 1e10  # of weights that forgetting has left without rows

    def __post_init__(self) -> None:
        if not 0 < self.forgetting <= 1:
            raise ConfigError(f"forgetting={self.forgetting} must be above 0 and at most 1")
        if self.forgets not in ("own", "all"):
            raise ConfigError(f"forgets={self.forgets!r} must be one of: own, all")
        if self.gates not in ("newton", "log_posteriors"):
            raise ConfigError(f"gates={self.gates!r} must be one of: newton, log_posteriors")
        if not (0 <= self.settle_share <= 1 and self.settle_rows >= 1 and self.block_rows >= 1):
            raise ConfigError(
                f"settle_share={self.settle_share} must be 0 to 1, settle_rows={self.settle_rows} and "
                f"block_rows={self.block_rows} at least 1"
            )
        if not (0 < self.expert_variance <= self.most_variance and 0 < self.gate_variance <= self.most_variance):
            raise ConfigError(
                f"expert_variance={self.expert_variance} and gate_variance={self.gate_variance} must be above 0 and at "
                f"most most_variance={self.most_variance}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Recursion:
    """State of the on-line algorithm: the information of each expert and each gate, and the rows seen."""

    mixture: Mixture
    expert_LCQ: Floats
    gate_GCQ: Floats
    rows_seen: int

    @classmethod
    def start(cls, mixture: Mixture, config: OnlineConfig) -> "Recursion":
        gates, size, free = mixture.gate_GPO.shape
        outputs = mixture.family.outputs
        # least squares: one matrix for all outputs of a model
        crossed = 1 if isinstance(mixture.family, Gaussian) else outputs
        crossed_gate = 1 if config.gates == "log_posteriors" else free
        return cls(
            mixture=mixture,
            expert_LCQ=np.tile(_ridge(crossed, size) / config.expert_variance, (mixture.tree.num_leaves, 1, 1)),
            gate_GCQ=np.tile(_ridge(crossed_gate, size) / config.gate_variance, (gates, 1, 1)),
            rows_seen=0,
        )

    @classmethod
    def after(cls, mixture: Mixture, rows: Rows, config: OnlineConfig, sums: Sums | None = None) -> "Recursion":
        """The state of a mixture that was fitted to `rows`: what they tell is remembered, and they count as seen.

        `sums`: what a pass of algorithm 1 over the rows at this mixture has told already.
        """
        fresh, regresses = cls.start(mixture, config), config.gates == "log_posteriors"
        if sums is None or regresses:
            sums = sweep(rows, mixture, log_posteriors=regresses).on(NUMPY)
        return cls(
            mixture=mixture,
            expert_LCQ=fresh.expert_LCQ + sums.experts.moments.information_MCQ,
            gate_GCQ=fresh.gate_GCQ + sums.gates.information_MCQ,
            rows_seen=len(rows),
        )


def learn_rows(state: Recursion, rows: Rows, config: OnlineConfig) -> Recursion:
    """The state after all of `rows`, in their order; a row of weight w counts as w rows.

    Source: Jordan & Jacobs 1994, on-line algorithm, with 1 / h in the denominator as weighted least squares requires.
    """
    for start in range(0, len(rows), config.block_rows):
        state = _learned(state, rows.block(slice(start, start + config.block_rows)), config, rows.work)
    return state


def forgetting_at(rows_seen: int, config: OnlineConfig) -> float:
    """Lambda after so many rows."""
    return 1 - (1 - config.forgetting) * (1 - config.settle_share) ** (rows_seen // config.settle_rows)


def _learned(state: Recursion, block: Block, config: OnlineConfig, work: Workspace) -> Recursion:
    mixture, num_rows = state.mixture, len(block.weight_N)
    sums = gathered([block], mixture, mixture, log_posteriors=config.gates == "log_posteriors", work=work)
    mass_L = sums.experts.weight_L
    # a gate ages as an expert below it does: by the mean of their rows
    under_GL = mixture.tree.under_GBL.any(axis=1)
    own_G = under_GL @ mass_L / np.maximum(under_GL.sum(axis=1), 1)
    expert_LCQ = sums.experts.moments.information_MCQ + _aged(state, state.expert_LCQ, mass_L, num_rows, config)
    gate_GCQ = sums.gates.information_MCQ + _aged(state, state.gate_GCQ, own_G, num_rows, config)
    gate_step_GPO = _step(sums.gates, gate_GCQ, block, config, is_exact=config.gates == "log_posteriors")
    is_exact = isinstance(mixture.family, Gaussian)
    step_LPO = _step(sums.experts.moments, expert_LCQ, block, config, is_exact=is_exact)
    experts = Experts(
        weight_LPO=mixture.experts.weight_LPO + step_LPO,
        covariance_LOO=_noise(mixture, sums.experts, step_LPO, state.rows_seen),
    )
    return Recursion(
        mixture=replace(mixture, gate_GPO=mixture.gate_GPO + gate_step_GPO, experts=experts),
        expert_LCQ=expert_LCQ,
        gate_GCQ=gate_GCQ,
        rows_seen=state.rows_seen + num_rows,
    )


def _aged(state: Recursion, information_MCQ: Floats, own_M: Floats, num_rows: int, config: OnlineConfig) -> Floats:
    """What is remembered: a model ages by every row, or by its own rows.

    With the first, rows of others take away what an expert knows and tell it nothing in its place.
    """
    age_M = own_M if config.forgets == "own" else np.full(len(own_M), float(num_rows))
    return information_MCQ * (forgetting_at(state.rows_seen, config) ** age_M)[:, None, None]


def _step(moments: Moments, information_MCQ: Floats, block: Block, config: OnlineConfig, *, is_exact: bool) -> Floats:
    """Steps of all models; where the information is a curvature that moves with the step, as far as is safe."""
    remembered = Moments(gradient_MPO=moments.gradient_MPO, information_MCQ=information_MCQ)
    step_MPO = newton_step(remembered, np.full(len(block.x_PN), 1 / config.most_variance))
    if is_exact or not step_MPO.size:
        return step_MPO
    return step_MPO * safe_share(spread(predictors(block.x_PN, step_MPO)))[:, None, None]


def _noise(mixture: Mixture, sums: ExpertSums, step_LPO: Floats, rows_seen: int) -> Floats:
    """Each covariance moved towards the block's squared errors, by their share of the rows that it stands for.

    The error before times the error after the step is what a row adds to the sum of squares.
    """
    family, covariance_LOO, mass_L = mixture.family, mixture.experts.covariance_LOO, sums.weight_L
    if not isinstance(family, Gaussian) or family.noise == "unit":
        return covariance_LOO
    after_LOO = family.shaped(sums.square_LOO - sums.moments.gradient_MPO.swapaxes(1, 2) @ step_LPO)
    stands_for = min(LEAST_NOISE_ROWS + rows_seen / len(mass_L), MOST_NOISE_ROWS)
    mass_L11, floor_OO = mass_L[:, None, None], family.noise_floor * np.eye(family.outputs)
    return covariance_LOO + (after_LOO + mass_L11 * (floor_OO - covariance_LOO)) / (mass_L11 + stands_for)


def _ridge(outputs: int, size: int) -> Floats:
    """The identity of `outputs` predictors of `size` weights, packed as information is; (C, Q)."""
    o_C, r_C = pairs(outputs)
    p_Q, q_Q = pairs(size)
    return ((o_C == r_C)[:, None] & (p_Q == q_Q)).astype(np.float64)
