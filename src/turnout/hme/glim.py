"""Generalized linear models in batches: the gates of a tree are M models, and so are its experts.

A log-likelihood is concave in the linear predictors; a step needs its score (first derivatives by predictor) and
its curvature (minus second derivatives, for pairs of predictors). Iteratively reweighted least squares is Newton's
method on these. How much the curvature of a softmax or a Poisson model can change along a step follows from how far
the step moves the predictors: so a step is shortened to where it cannot lower the objective, without another pass
over the rows to see whether it did.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from turnout.hme.algebra import pairs, product, solve_symmetric, stacked, unpack, weighted_grams
from turnout.hme.tree import Floats

GAINED = 1e-12  # a model whose next step promises less than this, in nats a row, is at its maximum
WHOLE = 1.5  # a step that moves no two predictors further apart is taken whole; 1.79 is where it could lose


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Sums over rows that a step of M models needs.

    gradient_MPO; information_MCQ: packed pairs of predictors times packed pairs of inputs, where C = 1 means that
    predictors share one matrix of inputs and do not interact (least squares).
    """

    gradient_MPO: Floats
    information_MCQ: Floats

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            gradient_MPO=self.gradient_MPO + other.gradient_MPO,
            information_MCQ=self.information_MCQ + other.information_MCQ,
        )

    def with_ridge(self, weight_MPO: Floats, ridge_P: Floats) -> "Moments":
        """The same for the objective minus half the ridge times squared weights."""
        return Moments(
            gradient_MPO=self.gradient_MPO - ridge_P[:, None] * weight_MPO, information_MCQ=self.information_MCQ
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Slopes:
    """Derivatives of the log-likelihoods of M models by their predictors, row by row: what moments are sums of."""

    score_MON: Floats
    curvature_MCN: Floats  # minus the second ones, for pairs of predictors; C = 1 as in `Moments`


def moments(x_PN: Floats, product_QN: Floats | None, *slopes: Slopes) -> list[Moments]:
    """Moments of several kinds of models: every weighted sum of x x^T, of all of them, in one matrix product.

    Nothing is copied where scores and curvatures of all kinds stand one after another in one array each. Without
    `product_QN`, which of many inputs is large, sums are formed a model at a time.
    """
    curvature_EN = stacked([one.curvature_MCN for one in slopes])
    # by products of pairs this way round it takes a sixth less time: models are fewer than pairs of inputs
    information_EQ = weighted_grams(x_PN, curvature_EN) if product_QN is None else product(product_QN, curvature_EN.T).T
    gradient_EP = product(stacked([one.score_MON for one in slopes]), x_PN.T)
    found = []
    for one in slopes:
        (models, outputs, _), crossed = one.score_MON.shape, one.curvature_MCN.shape[1]
        gradient_MOP = gradient_EP[: models * outputs].reshape(models, outputs, len(x_PN))
        information_MCQ = information_EQ[: models * crossed].reshape(models, crossed, information_EQ.shape[1])
        found.append(Moments(gradient_MPO=gradient_MOP.swapaxes(1, 2), information_MCQ=information_MCQ))
        gradient_EP, information_EQ = gradient_EP[models * outputs :], information_EQ[models * crossed :]
    return found


def newton_step(moments: Moments, ridge_P: Floats) -> Floats:
    """The step to the maximum of each model's quadratic approximation, the ridge included; (M, P, O)."""
    num_models, size, outputs = moments.gradient_MPO.shape
    if moments.information_MCQ.shape[1] == 1:
        matrix_MPP = unpack(moments.information_MCQ[:, 0], size) + np.diag(ridge_P)
        return solve_symmetric(matrix_MPP, moments.gradient_MPO)
    p_C, q_C = pairs(outputs)
    block_MOOPP = np.empty((num_models, outputs, outputs, size, size))
    block_MOOPP[:, p_C, q_C] = block_MOOPP[:, q_C, p_C] = unpack(moments.information_MCQ, size)
    matrix = block_MOOPP.transpose(0, 1, 3, 2, 4).reshape(num_models, outputs * size, outputs * size)
    matrix += np.diag(np.tile(ridge_P, outputs))
    gradient_M1 = moments.gradient_MPO.swapaxes(1, 2).reshape(num_models, outputs * size, 1)
    return solve_symmetric(matrix, gradient_M1).reshape(num_models, outputs, size).swapaxes(1, 2)


def climbed(
    weight_MPO: Floats, moments: Moments, ridge_P: Floats, move: Callable[[Floats], Floats], enough: float
) -> tuple[Floats, float]:
    """Weights after a Newton step that lowers no model's objective, and the most that a whole step had promised.

    `move` tells how far apart a step moves the predictors of a model at any row, (M,); models that have less than
    `enough` nats to gain stay where they are.
    """
    held = moments.with_ridge(weight_MPO, ridge_P)
    step_MPO = newton_step(held, ridge_P)
    promise_M = 0.5 * (held.gradient_MPO * step_MPO).sum(axis=(1, 2))
    move_M = move(step_MPO)
    is_taken_M = (promise_M > enough) & np.isfinite(move_M)
    share_M = np.where(is_taken_M, safe_share(np.where(is_taken_M, move_M, 0.0)), 0.0)
    step_MPO = np.where(is_taken_M[:, None, None], step_MPO, 0.0)
    return weight_MPO + share_M[:, None, None] * step_MPO, float(promise_M.max(initial=0.0, where=is_taken_M))


def safe_share(move_M: Floats) -> Floats:
    """How much of a Newton step to take so that the objective cannot fall, whatever the rows.

    Along a step that moves predictors at most R apart, the curvature of these models grows at most by exp(R t): a
    share t gains at least t - (exp(R t) - R t - 1) / R^2 of the squared Newton decrement, most at t = log(1 + R) / R.
    Source: Bach 2010, "Self-concordant analysis for logistic regression"; Sun & Tran-Dinh 2017, arXiv:1703.04599.
    """
    return np.where(move_M <= WHOLE, 1.0, np.log1p(move_M) / np.maximum(move_M, WHOLE))


def spread(move_MON: Floats) -> Floats:
    """How far apart the predictors of a model are at any row, the last one's zero among them; (M,)."""
    if move_MON.shape[1] == 1:
        return np.maximum(move_MON.max(axis=(1, 2)), -move_MON.min(axis=(1, 2)))
    high_MN, low_MN = np.maximum(move_MON.max(axis=1), 0.0), np.minimum(move_MON.min(axis=1), 0.0)
    return (high_MN - low_MN).max(axis=1)
