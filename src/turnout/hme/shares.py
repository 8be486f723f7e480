"""Softmax over branches, for gates and for experts alike: log shares, and the sums their Newton steps need."""

import numpy as np

from turnout.hme.algebra import log_sum_exp, pairs
from turnout.hme.glim import Moments
from turnout.hme.tree import Floats


def predictors(x_PN: Floats, weight_LPO: Floats) -> Floats:
    """Linear predictors of all models in one matrix product, (M, O, N)."""
    num_models, size, outputs = weight_LPO.shape
    return (weight_LPO.swapaxes(1, 2).reshape(-1, size) @ x_PN).reshape(num_models, outputs, x_PN.shape[1])


def log_softmax_with_last_zero(predictor_MON: Floats) -> Floats:
    """Log shares of O + 1 branches, the last of which has the predictor zero."""
    num_models, _, num_rows = predictor_MON.shape
    full_MBN = np.concatenate([predictor_MON, np.zeros((num_models, 1, num_rows))], axis=1)
    return full_MBN - log_sum_exp(full_MBN, axis=1)[:, None]


def softmax_moments(x_PN: Floats, product_QN: Floats, log_share_MBN: Floats, mass_MBN: Floats) -> Moments:
    """Moments of M softmax models with `mass_MBN` of each row on each branch; gates and softmax experts are both such.

    Source: Jordan & Jacobs 1994, appendix A (IRLS); the whole Hessian, not its diagonal blocks.
    """
    num_models, branches, num_rows = mass_MBN.shape
    weight_MN = mass_MBN.sum(axis=1)
    share_MBN = np.exp(log_share_MBN)
    score_MON = mass_MBN[:, :-1] - weight_MN[:, None] * share_MBN[:, :-1]
    gradient = score_MON.reshape(-1, num_rows) @ x_PN.T
    information = softmax_curvature(share_MBN, weight_MN).reshape(-1, num_rows) @ product_QN.T
    return Moments(
        value_M=softmax_value(log_share_MBN, mass_MBN),
        gradient_MPO=gradient.reshape(num_models, branches - 1, len(x_PN)).swapaxes(1, 2),
        information_MCQ=information.reshape(num_models, branches * (branches - 1) // 2, len(product_QN)),
    )


def softmax_value(log_share_MBN: Floats, mass_MBN: Floats) -> Floats:
    """Log-likelihoods of M softmax models; a branch of no mass adds nothing, however unlikely it is."""
    return (np.where(mass_MBN > 0, log_share_MBN, 0.0) * mass_MBN).sum(axis=(1, 2))


def softmax_curvature(share_MBN: Floats, weight_MN: Floats) -> Floats:
    """Minus the second derivatives of weight * log softmax, by pairs of predictors of all but the last branch.

    Shapes: share_MBN (M, B, N) sums over B to 1; weight_MN (M, N); returns (M, (B - 1) B / 2, N).
    """
    b_C, c_C = pairs(share_MBN.shape[1] - 1)
    weighted_MCN = weight_MN[:, None] * share_MBN[:, b_C]
    return weighted_MCN * ((b_C == c_C)[:, None] - share_MBN[:, c_C])
