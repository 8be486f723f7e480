"""One pass over the rows: the E-step and the sums of all M-steps, block by block, so that memory stays bounded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add

import numpy as np

from turnout.hme.algebra import CACHE_LINE, MANY_INPUTS, MakeRoom, Workspace, pair_products, room
from turnout.hme.checks import Scale
from turnout.hme.families import ExpertSums
from turnout.hme.gaussian import Gaussian
from turnout.hme.glim import Moments, Slopes, moments, spread
from turnout.hme.mixture import Mixture
from turnout.hme.paths import branch_mass
from turnout.hme.shares import Shares, predictors, softmax_slopes
from turnout.hme.tree import Floats, Ints

# posteriors below this are taken as this when their logarithm is regressed on (algorithm 2)
LEAST_POSTERIOR = 1e-3
# of the widest array of a block: smaller blocks cost more calls, larger ones leave a core's cache, and their memory is
# given back to the system and taken from it page by page
BLOCK_BYTES = 3 << 20
LEAST_ROWS = 128  # of a block, however wide its arrays
# of all blocks of a fit with their products of inputs: up to this they are kept from pass to pass, else formed anew
MOST_HELD_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """N rows: inputs, targets, weights. May be memory maps."""

    x_NP: Floats  # with the constant as the last column; where there is a `scale`, as they were given and without it
    y_NT: Floats
    weight_N: Floats
    scale: Scale | None = None  # by which inputs are standardized, block by block, so that no copy of all is made
    held: "tuple[Block, ...]" = ()  # all rows, for passes to come; empty: each pass forms its blocks anew
    work: Workspace = field(default_factory=Workspace)

    def __len__(self) -> int:
        return len(self.x_NP)

    @property
    def num_inputs(self) -> int:
        """P: inputs and the constant."""
        return self.x_NP.shape[1] + (self.scale is not None)

    def taken(self, row_N: Ints) -> "Rows":
        """These rows, in this order."""
        x_NP, y_NT, weight_N = self.x_NP[row_N], self.y_NT[row_N], self.weight_N[row_N]
        return Rows(x_NP=x_NP, y_NT=y_NT, weight_N=weight_N, scale=self.scale)

    def parts(self, widest: int) -> Iterator[slice]:
        """Slices of rows, all but the last alike: an array of `widest` numbers a row takes BLOCK_BYTES at most.

        Unless that were fewer than LEAST_ROWS.
        """
        most = max(LEAST_ROWS, BLOCK_BYTES // (8 * max(1, widest)))
        alike = -(-len(self) // max(1, -(-len(self) // most)))
        step = max(1, -(-alike // CACHE_LINE) * CACHE_LINE)
        return (slice(start, start + step) for start in range(0, len(self), step))

    def block(self, part: slice | Ints) -> "Block":
        """These rows as columns."""
        x_NP, y_NT = self.x_NP[part], self.y_NT[part]
        x_NP = x_NP if self.scale is None else self.scale.with_constant(x_NP)
        z_ZN = room(x_NP.shape[1] + y_NT.shape[1], len(x_NP))
        z_ZN[: x_NP.shape[1]], z_ZN[x_NP.shape[1] :] = x_NP.T, y_NT.T
        return Block(z_ZN=z_ZN, inputs=x_NP.shape[1], weight_N=self.weight_N[part])

    def held_for(self, mixture: Mixture) -> "Rows":
        """The same rows with their blocks for trees of this size kept, or as they are where that takes much memory."""
        inputs, targets = self.num_inputs, self.y_NT.shape[1]
        numbers_a_row = _pairs_held(inputs) + inputs + targets
        if 8 * numbers_a_row * len(self) > MOST_HELD_BYTES:
            return self
        return replace(self, held=tuple(self.blocks(mixture)))

    def blocks(self, mixture: Mixture) -> "Iterator[Block]":
        """Blocks small enough that the widest array of `mixture` takes about BLOCK_BYTES."""
        if self.held:
            return iter(self.held)
        tree, size, outputs = mixture.tree, self.num_inputs, mixture.family.outputs
        curvatures = 1 if isinstance(mixture.family, Gaussian) else outputs * (outputs + 1) // 2
        expert = tree.num_leaves * max(1, outputs, curvatures)
        gate = tree.num_gates * tree.branching * max(2, tree.branching - 1) // 2
        widest = max(_pairs_held(size), size, expert, tree.child_GB.size, gate)
        return (self.block(part) for part in self.parts(widest))


def _pairs_held(inputs: int) -> int:
    return 0 if inputs > MANY_INPUTS else inputs * (inputs + 1) // 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some of the rows, as columns: inputs with the constant above targets, so that residuals are one product."""

    z_ZN: Floats
    inputs: int  # the constant among them
    weight_N: Floats

    @property
    def x_PN(self) -> Floats:
        return self.z_ZN[: self.inputs]

    @property
    def y_TN(self) -> Floats:
        return self.z_ZN[self.inputs :]

    @cached_property
    def product_QN(self) -> Floats | None:
        """Formed once, for every pass over a block that is held; None of many inputs, whose pairs are too many."""
        return None if self.inputs > MANY_INPUTS else pair_products(self.x_PN)

    @cached_property
    def counts_once(self) -> bool:
        """Whether every row has the weight 1."""
        return bool((self.weight_N == 1).all())


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What a pass gathers: the log-likelihood under the mixture that gave the posteriors, and all moments."""

    loglik: float
    gates: Moments
    experts: ExpertSums

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            loglik=self.loglik + other.loglik, gates=self.gates + other.gates, experts=self.experts + other.experts
        )


def sweep(rows: Rows, believed: Mixture, at: Mixture | None = None, *, log_posteriors: bool = False) -> Sums:
    """Posteriors of `believed`, moments at the parameters of `at` (the same unless given).

    `log_posteriors`: gates regress on log posteriors (algorithm 2), instead of climbing their likelihood.
    """
    at = believed if at is None else at
    return gathered(rows.blocks(believed), believed, at, log_posteriors=log_posteriors, work=rows.work)


def gathered(blocks: Iterable[Block], believed: Mixture, at: Mixture, *, log_posteriors: bool, work: Workspace) -> Sums:
    """`sweep` of these blocks, of which there is at least one."""
    sums = (_block_sums(block, believed, at, log_posteriors=log_posteriors, work=work) for block in blocks)
    total = reduce(add, sums)
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
    gates, experts = moments(block.x_PN, block.product_QN, gate_slopes, expert_slopes)
    return Sums(
        loglik=float(block.weight_N @ posterior.loglik_N),
        gates=gates,
        experts=ExpertSums(moments=experts, weight_L=weight_L, square_LOO=square_LOO),
    )


def longest_move(rows: Rows, mixture: Mixture, step_MPO: Floats) -> Floats:
    """How far apart a step moves the predictors of each model at any row, (M,): reads the inputs alone."""
    most_M = np.zeros(len(step_MPO))
    if not step_MPO.size:
        return most_M
    for block in rows.blocks(mixture):
        most_M = np.maximum(most_M, spread(predictors(block.x_PN, step_MPO)))
    return most_M


def loglik(rows: Rows, mixture: Mixture) -> float:
    """Weighted log-likelihood of all rows, in nats."""
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
    mass_GBN = np.concatenate([mass_GON, mass_G1N - mass_GON.sum(axis=1, keepdims=True)], axis=1)
    share_GBN = mass_GBN / np.maximum(mass_G1N, np.finfo(float).tiny)
    target_GBN = np.log(np.maximum(share_GBN, LEAST_POSTERIOR))
    predictor_GON = shares.predictor_MON
    is_open_GON = np.isfinite(predictor_GON)
    log_ratio_GON = np.where(is_open_GON, predictor_GON, 0.0)
    error_GON = np.where(is_open_GON, target_GBN[:, :-1] - target_GBN[:, -1:] - log_ratio_GON, 0.0)
    np.multiply(mass_G1N, error_GON, out=predictor_GON)
    return Slopes(score_MON=predictor_GON, curvature_MCN=mass_G1N)
