"""One pass over the rows: the E-step and the sums of all M-steps, block by block, so that memory stays bounded."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import iadd

import numpy as np

from turnout.hme.families import ExpertSums
from turnout.hme.glim import Moments, Slopes, moments, spread
from turnout.hme.mixture import Mixture
from turnout.hme.paths import branch_mass
from turnout.hme.rows import Block, Rows
from turnout.hme.shares import Shares, predictors, softmax_slopes
from turnout.hme.space import MakeRoom, NumpySpace, space_of
from turnout.hme.tree import Floats, Ints
from turnout.hme.workspace import Workspace

# posteriors below this are taken as this when their logarithm is regressed on (algorithm 2)
LEAST_POSTERIOR = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What a pass gathers: the log-likelihood under the mixture that gave the posteriors, and all moments."""

    loglik: float
    gates: Moments
    experts: ExpertSums

    def __iadd__(self, other: "Sums") -> "Sums":
        gates, experts = self.gates, self.experts
        gates += other.gates
        experts += other.experts
        return Sums(loglik=self.loglik + other.loglik, gates=gates, experts=experts)

    def on(self, space: NumpySpace) -> "Sums":
        """The same in `space`."""
        return replace(self, gates=self.gates.on(space), experts=self.experts.on(space))

    def renumbered(self, gate_G: Ints, leaf_L: Ints) -> "Sums":
        """Those of these gates and leaves, in this order."""
        return replace(self, gates=self.gates[gate_G], experts=self.experts[leaf_L])


def sweep(rows: Rows, believed: Mixture, at: Mixture | None = None, *, log_posteriors: bool = False) -> Sums:
    """Posteriors of `believed`, moments at the parameters of `at` (the same unless given).

    `log_posteriors`: gates regress on log posteriors (algorithm 2), instead of climbing their likelihood.
    """
    believed = believed.on(rows.space)
    at = believed if at is None else at.on(rows.space)
    return gathered(rows.blocks(believed), believed, at, log_posteriors=log_posteriors, work=rows.work)


def gathered(blocks: Iterable[Block], believed: Mixture, at: Mixture, *, log_posteriors: bool, work: Workspace) -> Sums:
    """`sweep` of these blocks, of which there is at least one."""
    sums = (_block_sums(block, believed, at, log_posteriors=log_posteriors, work=work) for block in blocks)
    total = reduce(iadd, sums)
    return replace(total, experts=at.family.coloured(total.experts, at.experts))


def _block_sums(block: Block, believed: Mixture, at: Mixture, *, log_posteriors: bool, work: Workspace) -> Sums:
    """Sums over one block, those of Gaussian experts over white residuals.

    Scores are written over predictors and curvatures over masses: arrays that a core's cache still holds, in which
    gates and experts stand together.
    """
    work.clear()
    posterior = believed.posterior(block.z_ZN, work.room)
    weight_LN = posterior.leaf_LN
    weight_L = weight_LN @ block.weight_N
    if not block.counts_once:
        weight_LN *= block.weight_N
    reading = posterior.reading if at is believed else at.read(block.z_ZN, work.room)
    mass_GON, mass_G1N = branch_mass(at.tree, posterior.node_EN)
    slopes_of = _log_posterior_slopes if log_posteriors else _likelihood_slopes
    gate_slopes = slopes_of(reading.shares, mass_GON, mass_G1N, work.room)
    square_LOO = at.family.squares(weight_LN, reading.judged)
    expert_slopes = at.family.slopes(block.y_TN, weight_LN, reading.judged, reading.expert_LON)
    gates, experts = moments(block.x_PN, block.products(), gate_slopes, expert_slopes)
    return Sums(
        loglik=float(block.weight_N @ posterior.loglik_N),
        gates=gates,
        experts=ExpertSums(moments=experts, weight_L=weight_L, square_LOO=square_LOO),
    )


def longest_move(rows: Rows, mixture: Mixture, step_MPO: Floats) -> Floats:
    """How far apart a step moves the predictors of each model at any row, (M,): reads the inputs alone."""
    most_M = rows.space.zeros((len(step_MPO),))
    if 0 in step_MPO.shape:
        return most_M
    for block in rows.blocks(mixture):
        most_M = rows.space.maximum(most_M, spread(predictors(block.x_PN, step_MPO)))
    return most_M


def loglik(rows: Rows, mixture: Mixture) -> float:
    """Weighted log-likelihood of all rows, in nats."""
    mixture = mixture.on(rows.space)
    return sum(float(b.weight_N @ mixture.posterior(b.z_ZN).loglik_N) for b in rows.blocks(mixture))


def _likelihood_slopes(shares: Shares, mass_GON: Floats, mass_G1N: Floats, make: MakeRoom) -> Slopes:
    return softmax_slopes(
        shares.free_MON, mass_GON, mass_G1N, score_MON=shares.predictor_MON, curvature_M1N=mass_G1N, make=make
    )


def _log_posterior_slopes(shares: Shares, mass_GON: Floats, mass_G1N: Floats, make: MakeRoom) -> Slopes:
    """Least squares of a gate's predictors on log posteriors, weighted by the gate's own posterior.

    Both are taken relative to the last branch, whose predictor is zero.
    Source: Jordan & Jacobs 1994, algorithm 2; that posteriors are kept from zero is ours.
    """
    space = space_of(mass_GON)
    mass_GBN = space.concatenate([mass_GON, mass_G1N - mass_GON.sum(axis=1, keepdims=True)], axis=1)
    share_GBN = mass_GBN / space.maximum(mass_G1N, np.finfo(float).tiny)
    target_GBN = space.log(space.maximum(share_GBN, LEAST_POSTERIOR))
    predictor_GON = shares.predictor_MON
    is_open_GON = space.isfinite(predictor_GON)
    log_ratio_GON = space.where(is_open_GON, predictor_GON, 0.0)
    error_GON = space.where(is_open_GON, target_GBN[:, :-1] - target_GBN[:, -1:] - log_ratio_GON, 0.0)
    space.multiply(mass_G1N, error_GON, out=predictor_GON)
    return Slopes(score_MON=predictor_GON, curvature_MCN=mass_G1N)
