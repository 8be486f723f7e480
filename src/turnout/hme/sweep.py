"""One pass over the rows: the E-step and the sums of all M-steps, block by block, so that memory stays bounded."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from turnout.hme.algebra import pair_products
from turnout.hme.families import ExpertSums
from turnout.hme.glim import Moments, spread
from turnout.hme.mixture import Mixture
from turnout.hme.shares import predictors, softmax_moments
from turnout.hme.tree import Floats, Ints, Tree

# posteriors below this are taken as this when their logarithm is regressed on (algorithm 2)
LEAST_POSTERIOR = 1e-3
# of the widest array of a block: a few such arrays fit a core's own cache, and their memory is used again for the next
# block, where larger ones are given back to the system and taken from it page by page
BLOCK_BYTES = 384 << 10
LEAST_ROWS = 128  # of a block, however wide its arrays


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """N rows: inputs with the constant as their last column, targets, weights. May be memory maps."""

    x_NP: Floats
    y_NT: Floats
    weight_N: Floats

    def __len__(self) -> int:
        return len(self.x_NP)

    def taken(self, row_N: Ints) -> "Rows":
        """These rows, in this order."""
        return Rows(x_NP=self.x_NP[row_N], y_NT=self.y_NT[row_N], weight_N=self.weight_N[row_N])

    def parts(self, widest: int) -> Iterator[slice]:
        """Slices of rows for which an array with `widest` numbers a row takes about BLOCK_BYTES."""
        step = max(LEAST_ROWS, BLOCK_BYTES // (8 * max(1, widest)))
        return (slice(start, start + step) for start in range(0, len(self), step))

    def block(self, part: slice | Ints) -> "Block":
        """These rows as columns."""
        return Block(
            x_PN=np.ascontiguousarray(self.x_NP[part].T),
            y_TN=np.ascontiguousarray(self.y_NT[part].T),
            weight_N=self.weight_N[part],
        )

    def blocks(self, mixture: Mixture) -> "Iterator[Block]":
        """Blocks small enough that the widest array of `mixture` takes about BLOCK_BYTES."""
        tree, size = mixture.tree, self.x_NP.shape[1]
        widest = max(size * (size + 1) // 2, tree.num_leaves * max(1, mixture.family.outputs), tree.child_GB.size)
        return (self.block(part) for part in self.parts(widest))


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some of the rows, as columns."""

    x_PN: Floats
    y_TN: Floats
    weight_N: Floats


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
    total: Sums | None = None
    for block in rows.blocks(believed):
        sums = block_sums(block, believed, believed if at is None else at, log_posteriors=log_posteriors)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def block_sums(block: Block, believed: Mixture, at: Mixture, *, log_posteriors: bool) -> Sums:
    """`sweep` of one block."""
    posterior = believed.posterior(block.x_PN, block.y_TN)
    weight_LN = block.weight_N * posterior.leaf_LN
    if at is believed:
        shares, judged = posterior.shares, posterior.judged
    else:
        shares, judged = at.shares(block.x_PN), at.family.judge(block.x_PN, block.y_TN, at.experts)
    product_QN, mass_GBN = pair_products(block.x_PN), branch_mass(at.tree, weight_LN)
    if log_posteriors:
        gates = _log_posterior_moments(block.x_PN, product_QN, shares.log_MBN, mass_GBN)
    else:
        gates = softmax_moments(block.x_PN, product_QN, shares.free_MON, mass_GBN)
    return Sums(
        loglik=float(block.weight_N @ posterior.loglik_N),
        gates=gates,
        experts=at.family.sums(block.x_PN, product_QN, block.y_TN, weight_LN, judged, at.experts),
    )


def longest_move(rows: Rows, step_MPO: Floats) -> Floats:
    """How far apart a step moves the predictors of each model at any row, (M,): reads the inputs alone."""
    most_M = np.zeros(len(step_MPO))
    if not step_MPO.size:
        return most_M
    for part in rows.parts(step_MPO.shape[0] * step_MPO.shape[2]):
        most_M = np.maximum(most_M, spread(predictors(rows.x_NP[part].T, step_MPO)))
    return most_M


def loglik(rows: Rows, mixture: Mixture) -> float:
    """Weighted log-likelihood of all rows, in nats."""
    return sum(float(b.weight_N @ mixture.posterior(b.x_PN, b.y_TN).loglik_N) for b in rows.blocks(mixture))


def branch_mass(tree: Tree, weight_LN: Floats) -> Floats:
    """Posterior mass below each branch: h_i, h_i h_j|i, ... of all levels in one product; (G, B, N)."""
    return (tree.path_EL @ weight_LN).reshape(*tree.child_GB.shape, weight_LN.shape[1])


def _log_posterior_moments(x_PN: Floats, product_QN: Floats, log_share_GBN: Floats, mass_GBN: Floats) -> Moments:
    """Least squares of a gate's predictors on log posteriors, weighted by the gate's own posterior.

    Both are taken relative to the last branch, whose predictor is zero.
    Source: Jordan & Jacobs 1994, algorithm 2; that posteriors are kept from zero is ours.
    """
    weight_GN = mass_GBN.sum(axis=1)
    share_GBN = mass_GBN / np.maximum(weight_GN, np.finfo(float).tiny)[:, None]
    target_GBN = np.log(np.maximum(share_GBN, LEAST_POSTERIOR))
    is_open_GON = np.isfinite(log_share_GBN[:, :-1])
    log_ratio_GON = np.where(is_open_GON, log_share_GBN[:, :-1] - log_share_GBN[:, -1:], 0.0)
    error_GON = np.where(is_open_GON, target_GBN[:, :-1] - target_GBN[:, -1:] - log_ratio_GON, 0.0)
    score_GON = weight_GN[:, None] * error_GON
    gates, free, num_rows = score_GON.shape
    return Moments(
        gradient_MPO=(score_GON.reshape(-1, num_rows) @ x_PN.T).reshape(gates, free, len(x_PN)).swapaxes(1, 2),
        information_MCQ=(weight_GN @ product_QN.T)[:, None],
    )
