"""Softmax over branches, for gates and for experts alike: shares, and the sums their Newton steps need."""

from dataclasses import dataclass

import numpy as np

from turnout.hme.algebra import pairs, product
from turnout.hme.glim import Slopes
from turnout.hme.tree import Floats

MOST_PREDICTOR = 700.0  # its exponential is just below the largest number


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Probabilities of B = O + 1 branches of M models.

    `log_EN` holds the predictors of all branches but the last, then for each model the log share of its last branch:
    what a branch's log share is the sum of.
    """

    free_MON: Floats  # of all branches but the last
    log_EN: Floats

    @property
    def log_MBN(self) -> Floats:
        """Log shares of all branches."""
        models, outputs, num_rows = self.free_MON.shape
        last_M1N = self.log_EN[models * outputs :, None]
        predictor_MON = self.log_EN[: models * outputs].reshape(models, outputs, num_rows)
        return np.concatenate([predictor_MON + last_M1N, last_M1N], axis=1)


def predictors(x_PN: Floats, weight_MPO: Floats) -> Floats:
    """Linear predictors of all models in one matrix product, (M, O, N)."""
    num_models, size, outputs = weight_MPO.shape
    flat_EP = np.ascontiguousarray(weight_MPO.swapaxes(1, 2)).reshape(-1, size)
    return product(flat_EP, x_PN).reshape(num_models, outputs, x_PN.shape[1])


def softmax_with_last_zero(predictor_MON: Floats) -> Shares:
    """Shares of O + 1 branches, the last of which has the predictor zero; -inf closes a branch."""
    models, outputs, num_rows = predictor_MON.shape
    log_EN = np.empty((models * (outputs + 1), num_rows))
    log_EN[: models * outputs] = predictor_MON.reshape(-1, num_rows)
    last_MN = log_EN[models * outputs :]
    if outputs == 1:
        return Shares(free_MON=_logistic(predictor_MON[:, 0], last_MN)[:, None], log_EN=log_EN)
    top_M1N = np.maximum(predictor_MON.max(axis=1, keepdims=True), 0.0)
    free_MON = np.exp(predictor_MON - top_M1N)
    sum_MN = free_MON.sum(axis=1) + np.exp(-top_M1N[:, 0])
    free_MON /= sum_MN[:, None]
    np.negative(top_M1N[:, 0], out=last_MN)
    last_MN -= np.log(sum_MN)
    return Shares(free_MON=free_MON, log_EN=log_EN)


def _logistic(predictor_MN: Floats, last_MN: Floats) -> Floats:
    """The first of two branches' shares; the second's logarithms go to `last_MN`.

    One exponential and one logarithm; both shares are exact to rounding of the predictor.
    """
    is_far = predictor_MN.max(initial=0.0) > MOST_PREDICTOR
    free_MN = np.exp(np.minimum(predictor_MN, MOST_PREDICTOR) if is_far else predictor_MN)
    np.add(free_MN, 1.0, out=last_MN)
    np.reciprocal(last_MN, out=last_MN)
    free_MN *= last_MN
    np.log(last_MN, out=last_MN)
    if is_far:
        np.minimum(last_MN, -predictor_MN, out=last_MN)
    return free_MN


def softmax_slopes(share_MON: Floats, mass_MON: Floats, total_M1N: Floats) -> Slopes:
    """Slopes of M softmax models; gates and softmax experts are both such.

    Shapes: mass_MON (M, O, N) of each row on each branch but the last; total_M1N (M, 1, N) on all of them.
    Source: Jordan & Jacobs 1994, appendix A (IRLS); the whole Hessian, not its diagonal blocks.
    """
    weighted_MON = total_M1N * share_MON
    score_MON = mass_MON - weighted_MON
    return Slopes(score_MON=score_MON, curvature_MCN=_softmax_curvature(share_MON, weighted_MON))


def _softmax_curvature(share_MON: Floats, weighted_MON: Floats) -> Floats:
    """Minus the second derivatives of weight * log softmax, by pairs of predictors of all but the last branch.

    Shapes: share_MON (M, O, N); weighted_MON (M, O, N) weight times share, which may be used up; returns
    (M, O (O + 1) / 2, N).
    """
    if share_MON.shape[1] == 1:
        weighted_MON *= 1.0 - share_MON
        return weighted_MON
    o_C, r_C = pairs(share_MON.shape[1])
    return weighted_MON[:, o_C] * ((o_C == r_C)[:, None] - share_MON[:, r_C])
