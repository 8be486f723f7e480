"""Softmax over branches, for gates and for experts alike: shares, and the sums their Newton steps need."""

from dataclasses import dataclass
from typing import Any

from turnout.hme.algebra import product
from turnout.hme.glim import Slopes
from turnout.hme.space import MakeRoom, space_of
from turnout.hme.tree import Floats

MOST_PREDICTOR = 700.0  # its exponential is just below the largest number


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Probabilities of B = O + 1 branches of M models: a log share is a predictor and the last branch's log share."""

    predictor_MON: Floats  # of all branches but the last
    free_MON: Floats  # their shares
    log_last_MN: Floats

    @property
    def log_MBN(self) -> Floats:
        """Log shares of all branches."""
        last_M1N = self.log_last_MN[:, None]
        return space_of(last_M1N).concatenate([self.predictor_MON + last_M1N, last_M1N], axis=1)


def predictors(x_PN: Floats, weight_MPO: Floats) -> Floats:
    """Linear predictors of all models in one matrix product, (M, O, N)."""
    num_models, _, outputs = weight_MPO.shape
    return product(by_rows(weight_MPO), x_PN).reshape(num_models, outputs, x_PN.shape[1])


def by_rows(weight_MPO: Floats) -> Floats:
    """The weights of every predictor as a row, (M O, P)."""
    space = space_of(weight_MPO)
    return space.ascontiguousarray(weight_MPO.swapaxes(1, 2)).reshape(-1, weight_MPO.shape[1])


def softmax_with_last_zero(predictor_MON: Floats, make: MakeRoom | None = None) -> Shares:
    """Shares of O + 1 branches, the last of which has the predictor zero; -inf closes a branch."""
    if predictor_MON.shape[1] == 1:
        return _logistic(predictor_MON, make)
    space = space_of(predictor_MON)
    top_M1N = space.maximum(space.max(predictor_MON, axis=1, keepdims=True), 0.0)
    free_MON = space.exp(predictor_MON - top_M1N)
    sum_MN = free_MON.sum(axis=1) + space.exp(-top_M1N[:, 0])
    free_MON /= sum_MN[:, None]
    log_last_MN = -top_M1N[:, 0] - space.log(sum_MN)
    return Shares(predictor_MON=predictor_MON, free_MON=free_MON, log_last_MN=log_last_MN)


def _logistic(predictor_M1N: Floats, make: MakeRoom | None) -> Shares:
    """Two branches need one exponential and one logarithm; both are exact to rounding of the predictor."""
    space = space_of(predictor_M1N)
    make = make or space.room
    is_far = bool(space.positive_max(predictor_M1N) > MOST_PREDICTOR)
    free_M1N, last_M1N = make(*predictor_M1N.shape), make(*predictor_M1N.shape)
    space.exp(space.minimum(predictor_M1N, MOST_PREDICTOR) if is_far else predictor_M1N, out=free_M1N)
    space.add(free_M1N, 1.0, out=last_M1N)
    space.reciprocal(last_M1N, out=last_M1N)
    free_M1N *= last_M1N
    space.log(last_M1N, out=last_M1N)
    if is_far:
        space.minimum(last_M1N, -predictor_M1N, out=last_M1N)
    return Shares(predictor_MON=predictor_M1N, free_MON=free_M1N, log_last_MN=last_M1N[:, 0])


def softmax_slopes(
    share_MON: Floats,
    mass_MON: Floats,
    total_M1N: Floats,
    *,
    score_MON: Any = None,
    curvature_M1N: Any = None,
    make: MakeRoom | None = None,
) -> Slopes:
    """Slopes of M softmax models; gates and softmax experts are both such.

    Shapes: mass_MON (M, O, N) of each row on each branch but the last; total_M1N (M, 1, N) on all of them. score_MON
    and curvature_M1N (this of two branches alone) are where slopes go, if given; masses may stand there.
    Source: Jordan & Jacobs 1994, appendix A (IRLS); the whole Hessian, not its diagonal blocks.
    """
    space = space_of(share_MON)
    make = make or space.room
    weighted_MON = space.multiply(total_M1N, share_MON, out=make(*share_MON.shape))
    score_MON = space.subtract(mass_MON, weighted_MON, out=score_MON)
    if share_MON.shape[1] == 1:
        curvature_M1N = space.subtract(1.0, share_MON, out=curvature_M1N)
        curvature_M1N *= weighted_MON
        return Slopes(score_MON=score_MON, curvature_MCN=curvature_M1N)
    return Slopes(score_MON=score_MON, curvature_MCN=_curvatures(share_MON, weighted_MON, make))


def _curvatures(share_MON: Floats, weighted_MON: Floats, make: MakeRoom) -> Floats:
    """Of all pairs of branches o <= r, each written once: of 150 classes they are the widest array by far."""
    space, (models, outputs, num_rows) = space_of(share_MON), share_MON.shape
    curvature_MCN = make(models, outputs * (outputs + 1) // 2, num_rows)
    rest_MON, less_MON, start = 1.0 - share_MON, -weighted_MON, 0
    for output in range(outputs):
        end = start + outputs - output
        space.multiply(weighted_MON[:, output], rest_MON[:, output], out=curvature_MCN[:, start])
        pair_M1N, others_MRN = less_MON[:, output, None], share_MON[:, output + 1 :]
        space.multiply(pair_M1N, others_MRN, out=curvature_MCN[:, start + 1 : end])
        start = end
    return curvature_MCN
