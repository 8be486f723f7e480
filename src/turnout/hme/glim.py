"""Generalized linear models in batches: the gates of a tree are M models, and so are its experts.

A log-likelihood is concave in the linear predictors; a step needs its score (first derivatives by predictor) and
its curvature (minus second derivatives, for pairs of predictors). Iteratively reweighted least squares is Newton's
method on these, damped here so that no step lowers the objective.
"""

from dataclasses import dataclass, replace

import numpy as np

from turnout.hme.algebra import pairs, solve_symmetric, unpack
from turnout.hme.tree import Floats

GAINED = 1e-12  # a model whose next step promises less than this, in nats a row, is at its maximum


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over rows that a step of M models needs.

    value_M: objectives; gradient_MPO; information_MCQ: packed pairs of predictors times packed pairs of inputs, where
    C = 1 means that predictors share one matrix of inputs and do not interact (least squares).
    """

    value_M: Floats
    gradient_MPO: Floats
    information_MCQ: Floats

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            value_M=self.value_M + other.value_M,
            gradient_MPO=self.gradient_MPO + other.gradient_MPO,
            information_MCQ=self.information_MCQ + other.information_MCQ,
        )

    def with_ridge(self, weight_MPO: Floats, ridge_P: Floats) -> "Moments":
        """The same for the objective minus half the ridge times squared weights."""
        return Moments(
            value_M=self.value_M - _ridge_cost(weight_MPO, ridge_P),
            gradient_MPO=self.gradient_MPO - ridge_P[:, None] * weight_MPO,
            information_MCQ=self.information_MCQ,
        )


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


@dataclass(frozen=True, kw_only=True)
class Climb:
    """Where M models stand on their way up: the best weights so far and the step that is tried next."""

    weight_MPO: Floats
    value_M: Floats
    step_MPO: Floats
    scale_M: Floats
    promise_M: Floats  # what a full step would gain were the approximation exact, in nats

    @classmethod
    def start(cls, weight_MPO: Floats, moments: Moments, ridge_P: Floats) -> "Climb":
        held = moments.with_ridge(weight_MPO, ridge_P)
        step_MPO = newton_step(held, ridge_P)
        return cls(
            weight_MPO=weight_MPO,
            value_M=held.value_M,
            step_MPO=step_MPO,
            scale_M=np.ones(len(weight_MPO)),
            promise_M=0.5 * (held.gradient_MPO * step_MPO).sum(axis=(1, 2)),
        )

    @property
    def trial_MPO(self) -> Floats:
        return self.weight_MPO + self.scale_M[:, None, None] * self.step_MPO

    @property
    def promise(self) -> float:
        """The most that a model's next trial promises, in nats."""
        return float((self.scale_M * self.promise_M).max(initial=0.0))

    def fell(self, enough: float) -> bool:
        """Whether a model with more than `enough` to gain had its last trial rejected."""
        return bool(((self.scale_M < 1) & (self.scale_M * self.promise_M > enough)).any())

    def arrived(self) -> "Climb":
        """The trial taken as it is, with nothing left to gain."""
        return replace(
            self,
            weight_MPO=self.trial_MPO,
            value_M=np.full_like(self.value_M, np.inf),
            step_MPO=np.zeros_like(self.step_MPO),
            promise_M=np.zeros_like(self.promise_M),
        )

    def settled(self, value_M: Floats, ridge_P: Floats) -> "Climb":
        """After the trial was valued: models that rose stay there for good, the others will try half the step."""
        trial_MPO = self.trial_MPO
        held_M = value_M - _ridge_cost(trial_MPO, ridge_P)
        rose_M = held_M >= self.value_M
        return replace(
            self,
            weight_MPO=np.where(rose_M[:, None, None], trial_MPO, self.weight_MPO),
            value_M=np.where(rose_M, held_M, self.value_M),
            step_MPO=np.where(rose_M[:, None, None], 0.0, self.step_MPO),
            scale_M=np.where(rose_M, self.scale_M, 0.5 * self.scale_M),
            promise_M=np.where(rose_M, 0.0, self.promise_M),
        )

    def judged(self, moments: Moments, ridge_P: Floats) -> "Climb":
        """After the trial was evaluated: models that rose go on from there, the others will try half the step."""
        there = Climb.start(self.trial_MPO, moments, ridge_P)
        rose_M = there.value_M >= self.value_M
        rose_M11 = rose_M[:, None, None]
        return Climb(
            weight_MPO=np.where(rose_M11, there.weight_MPO, self.weight_MPO),
            value_M=np.where(rose_M, there.value_M, self.value_M),
            step_MPO=np.where(rose_M11, there.step_MPO, self.step_MPO),
            scale_M=np.where(rose_M, 1.0, 0.5 * self.scale_M),
            promise_M=np.where(rose_M, there.promise_M, self.promise_M),
        )


def _ridge_cost(weight_MPO: Floats, ridge_P: Floats) -> Floats:
    """Half the ridge times squared weights, model by model."""
    return 0.5 * (ridge_P[:, None] * weight_MPO**2).sum(axis=(1, 2))
