"""One pass over the rows: the E-step and the sums of all M-steps, block by block, so that memory stays bounded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from turnout.hme.algebra import pair_products
from turnout.hme.families import ExpertSums, softmax_moments
from turnout.hme.glim import Moments
from turnout.hme.mixture import Mixture
from turnout.hme.tree import Floats

# posteriors below this are taken as this when their logarithm is regressed on (algorithm 2)
LEAST_POSTERIOR = 1e-3
BLOCK_BYTES = 8 << 20  # of the widest array of a block: what a core's cache and its neighbours hold


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """N rows: inputs with the constant as their last column, targets, weights. May be memory maps."""

    x_NP: Floats
    y_NT: Floats
    weight_N: Floats

    def __len__(self) -> int:
        return len(self.x_NP)

    def blocks(self, block_size: int) -> "Iterator[Rows]":
        for start in range(0, len(self), block_size):
            part = slice(start, start + block_size)
            yield Rows(x_NP=self.x_NP[part], y_NT=self.y_NT[part], weight_N=self.weight_N[part])


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
    for block in rows.blocks(block_size(believed, rows.x_NP.shape[1])):
        sums = _block_sums(block, believed, believed if at is None else at, log_posteriors)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def gate_sweep(rows: Rows, believed: Mixture, gate_GPO: Floats) -> Moments:
    """The gates' part of `sweep` alone, with posteriors of `believed` and moments at `gate_GPO`."""
    at, total = replace(believed, gate_GPO=gate_GPO), None
    for block in rows.blocks(block_size(believed, rows.x_NP.shape[1])):
        weight_NL = block.weight_N[:, None] * believed.posterior(block.x_NP, block.y_NT).leaf_NL
        log_share_NGB, mass_NGB = at.log_shares(block.x_NP), _branch_mass(at, weight_NL)
        moments = softmax_moments(block.x_NP, pair_products(block.x_NP), log_share_NGB, mass_NGB)
        total = moments if total is None else total + moments
    assert total is not None
    return total


def loglik(rows: Rows, mixture: Mixture) -> float:
    """Weighted log-likelihood of all rows, in nats."""
    blocks = rows.blocks(block_size(mixture, rows.x_NP.shape[1]))
    return sum(float(b.weight_N @ mixture.posterior(b.x_NP, b.y_NT).loglik_N) for b in blocks)


def block_size(mixture: Mixture, size: int) -> int:
    """Rows of a block: its widest array takes about BLOCK_BYTES."""
    tree = mixture.tree
    widest = max(size * (size + 1) // 2, tree.num_leaves * max(1, mixture.family.outputs), tree.child_GB.size)
    return max(64, BLOCK_BYTES // (8 * widest))


def _block_sums(block: Rows, believed: Mixture, at: Mixture, log_posteriors: bool) -> Sums:
    posterior = believed.posterior(block.x_NP, block.y_NT)
    weight_NL = block.weight_N[:, None] * posterior.leaf_NL
    if at is believed:
        log_share_NGB, judged = posterior.log_share_NGB, posterior.judged
    else:
        log_share_NGB = at.log_shares(block.x_NP)
        judged = at.family.judge(block.x_NP, block.y_NT, at.experts)
    product_NQ = pair_products(block.x_NP)
    mass_NGB = _branch_mass(at, weight_NL)
    gate_moments = _log_posterior_moments if log_posteriors else softmax_moments
    return Sums(
        loglik=float(block.weight_N @ posterior.loglik_N),
        gates=gate_moments(block.x_NP, product_NQ, log_share_NGB, mass_NGB),
        experts=at.family.sums(block.x_NP, product_NQ, block.y_NT, weight_NL, judged, at.experts),
    )


def _branch_mass(mixture: Mixture, weight_NL: Floats) -> Floats:
    """Posterior mass below each branch: h_i, h_i h_j|i, ... of all levels in one product."""
    return (weight_NL @ mixture.tree.path_EL.T).reshape(len(weight_NL), *mixture.tree.child_GB.shape)


def _log_posterior_moments(x_NP: Floats, product_NQ: Floats, log_share_NGB: Floats, mass_NGB: Floats) -> Moments:
    """Least squares of a gate's predictors on log posteriors, weighted by the gate's own posterior.

    Both are taken relative to the last branch, whose predictor is zero.
    Source: Jordan & Jacobs 1994, algorithm 2; that posteriors are kept from zero is ours.
    """
    weight_NG = mass_NGB.sum(axis=2)
    share_NGB = mass_NGB / np.maximum(weight_NG, np.finfo(float).tiny)[:, :, None]
    target_NGB = np.log(np.maximum(share_NGB, LEAST_POSTERIOR))
    is_open_NGO = np.isfinite(log_share_NGB[:, :, :-1])
    log_ratio_NGO = np.where(is_open_NGO, log_share_NGB[:, :, :-1] - log_share_NGB[:, :, -1:], 0.0)
    error_NGO = np.where(is_open_NGO, target_NGB[:, :, :-1] - target_NGB[:, :, -1:] - log_ratio_NGO, 0.0)
    score_NGO = weight_NG[:, :, None] * error_NGO
    gradient = x_NP.T @ score_NGO.reshape(len(x_NP), -1)
    return Moments(
        value_M=-0.5 * np.einsum("ngo,ngo->g", score_NGO, error_NGO),
        gradient_MPO=gradient.reshape(-1, *score_NGO.shape[1:]).swapaxes(0, 1),
        information_MCQ=(weight_NG.T @ product_NQ)[:, None],
    )
