"""One pass over the rows: the E-step and the sums of all M-steps, block by block, so that memory stays bounded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from turnout.hme.algebra import pair_products
from turnout.hme.families import ExpertSums
from turnout.hme.glim import Moments
from turnout.hme.mixture import Mixture
from turnout.hme.shares import softmax_moments, softmax_value
from turnout.hme.tree import Floats

# posteriors below this are taken as this when their logarithm is regressed on (algorithm 2)
LEAST_POSTERIOR = 1e-3
BLOCK_BYTES = 4 << 20  # of the widest array of a block: what a core's cache and its neighbours hold


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """N rows: inputs with the constant as their last column, targets, weights. May be memory maps."""

    x_NP: Floats
    y_NT: Floats
    weight_N: Floats

    def __len__(self) -> int:
        return len(self.x_NP)

    def blocks(self, mixture: Mixture) -> "Iterator[Block]":
        """Blocks small enough that the widest array of `mixture` takes about BLOCK_BYTES."""
        tree, size = mixture.tree, self.x_NP.shape[1]
        widest = max(size * (size + 1) // 2, tree.num_leaves * max(1, mixture.family.outputs), tree.child_GB.size)
        step = max(64, BLOCK_BYTES // (8 * widest))
        for start in range(0, len(self), step):
            part = slice(start, start + step)
            yield Block(
                x_PN=np.ascontiguousarray(self.x_NP[part].T),
                y_TN=np.ascontiguousarray(self.y_NT[part].T),
                weight_N=self.weight_N[part],
            )


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
        sums = _block_sums(block, believed, believed if at is None else at, log_posteriors)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def gate_sweep(rows: Rows, believed: Mixture, gate_GPO: Floats) -> Moments:
    """The gates' part of `sweep` alone, with posteriors of `believed` and moments at `gate_GPO`."""
    at, total = replace(believed, gate_GPO=gate_GPO), None
    for block in rows.blocks(believed):
        weight_LN = block.weight_N * believed.posterior(block.x_PN, block.y_TN).leaf_LN
        log_share_GBN, mass_GBN = at.log_shares(block.x_PN), _branch_mass(at, weight_LN)
        moments = softmax_moments(block.x_PN, pair_products(block.x_PN), log_share_GBN, mass_GBN)
        total = moments if total is None else total + moments
    assert total is not None
    return total


def gate_values(rows: Rows, believed: Mixture, gate_GPO: Floats) -> Floats:
    """The gates' objectives alone: less than half the work of `gate_sweep`."""
    at, value_G = replace(believed, gate_GPO=gate_GPO), np.zeros(len(gate_GPO))
    for block in rows.blocks(believed):
        weight_LN = block.weight_N * believed.posterior(block.x_PN, block.y_TN).leaf_LN
        value_G += softmax_value(at.log_shares(block.x_PN), _branch_mass(at, weight_LN))
    return value_G


def loglik(rows: Rows, mixture: Mixture) -> float:
    """Weighted log-likelihood of all rows, in nats."""
    return sum(float(b.weight_N @ mixture.posterior(b.x_PN, b.y_TN).loglik_N) for b in rows.blocks(mixture))


def _block_sums(block: Block, believed: Mixture, at: Mixture, log_posteriors: bool) -> Sums:
    posterior = believed.posterior(block.x_PN, block.y_TN)
    weight_LN = block.weight_N * posterior.leaf_LN
    if at is believed:
        log_share_GBN, judged = posterior.log_share_GBN, posterior.judged
    else:
        log_share_GBN = at.log_shares(block.x_PN)
        judged = at.family.judge(block.x_PN, block.y_TN, at.experts)
    product_QN = pair_products(block.x_PN)
    mass_GBN = _branch_mass(at, weight_LN)
    gate_moments = _log_posterior_moments if log_posteriors else softmax_moments
    return Sums(
        loglik=float(block.weight_N @ posterior.loglik_N),
        gates=gate_moments(block.x_PN, product_QN, log_share_GBN, mass_GBN),
        experts=at.family.sums(block.x_PN, product_QN, block.y_TN, weight_LN, judged, at.experts),
    )


def _branch_mass(mixture: Mixture, weight_LN: Floats) -> Floats:
    """Posterior mass below each branch: h_i, h_i h_j|i, ... of all levels in one product."""
    return (mixture.tree.path_EL @ weight_LN).reshape(*mixture.tree.child_GB.shape, weight_LN.shape[1])


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
        value_M=-0.5 * (score_GON * error_GON).sum(axis=(1, 2)),
        gradient_MPO=(score_GON.reshape(-1, num_rows) @ x_PN.T).reshape(gates, free, len(x_PN)).swapaxes(1, 2),
        information_MCQ=(weight_GN @ product_QN.T)[:, None],
    )
