"""Softmax over branches, for gates and for experts alike: shares, and the sums their Newton steps need."""

from dataclasses import dataclass

import numpy as np

from turnout.hme.algebra import pairs
from turnout.hme.glim import Slopes
from turnout.hme.tree import Floats

MOST_PREDICTOR = 700.0  # its exponential is just below the largest number


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Probabilities of B = O + 1 branches of M models."""

    log_MBN: Floats
    free_MON: Floats  # of all branches but the last


def predictors(x_PN: Floats, weight_MPO: Floats) -> Floats:
    """Linear predictors of all models in one matrix product, (M, O, N)."""
    num_models, size, outputs = weight_MPO.shape
    return (weight_MPO.swapaxes(1, 2).reshape(-1, size) @ x_PN).reshape(num_models, outputs, x_PN.shape[1])


def softmax_with_last_zero(predictor_MON: Floats) -> Shares:
    """Shares of O + 1 branches, the last of which has the predictor zero; -inf closes a branch."""
    num_models, outputs, num_rows = predictor_MON.shape
    log_MBN = np.empty((num_models, outputs + 1, num_rows))
    if outputs == 1:
        return _logistic(predictor_MON, log_MBN)
    top_M1N = np.maximum(predictor_MON.max(axis=1, keepdims=True), 0.0)
    np.subtract(predictor_MON, top_M1N, out=log_MBN[:, :-1])
    np.negative(top_M1N, out=log_MBN[:, -1:])
    share_MBN = np.exp(log_MBN)
    sum_M1N = share_MBN.sum(axis=1, keepdims=True)
    log_MBN -= np.log(sum_M1N)
    return Shares(log_MBN=log_MBN, free_MON=share_MBN[:, :-1] / sum_M1N)


def _logistic(predictor_M1N: Floats, log_M2N: Floats) -> Shares:
    """Two branches need one exponential and one logarithm; both are exact to rounding of the predictor."""
    free_M1N = np.exp(np.minimum(predictor_M1N, MOST_PREDICTOR))
    sum_M1N = free_M1N + 1.0
    free_M1N /= sum_M1N
    log_sum_M1N = np.maximum(np.log(sum_M1N, out=sum_M1N), predictor_M1N, out=sum_M1N)
    np.subtract(predictor_M1N, log_sum_M1N, out=log_M2N[:, :1])
    np.negative(log_sum_M1N, out=log_M2N[:, 1:])
    return Shares(log_MBN=log_M2N, free_MON=free_M1N)


def softmax_slopes(share_MON: Floats, mass_MBN: Floats) -> Slopes:
    """Slopes of M softmax models with `mass_MBN` of each row on each branch; gates and softmax experts are both such.

    Source: Jordan & Jacobs 1994, appendix A (IRLS); the whole Hessian, not its diagonal blocks.
    """
    weighted_MON = mass_MBN.sum(axis=1, keepdims=True) * share_MON
    return Slopes(score_MON=mass_MBN[:, :-1] - weighted_MON, curvature_MCN=softmax_curvature(share_MON, weighted_MON))


def softmax_curvature(share_MON: Floats, weighted_MON: Floats) -> Floats:
    """Minus the second derivatives of weight * log softmax, by pairs of predictors of all but the last branch.

    Shapes: share_MON (M, O, N); weighted_MON (M, O, N) weight times share; returns (M, O (O + 1) / 2, N).
    """
    if share_MON.shape[1] == 1:
        return weighted_MON * (1.0 - share_MON)
    o_C, r_C = pairs(share_MON.shape[1])
    return weighted_MON[:, o_C] * ((o_C == r_C)[:, None] - share_MON[:, r_C])
