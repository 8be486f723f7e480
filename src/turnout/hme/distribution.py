"""What a mixture predicts for a row: a whole distribution, with mean, variance, quantiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri, pdtr, pdtrik

from turnout.hme.tree import Floats

HALVINGS = 60  # of an interval that holds a quantile: to rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictive:
    """Mixtures of L normal (or Poisson) densities for N rows and O outputs, in the units of y."""

    weight_NL: Floats
    mean_NLO: Floats
    variance_NLO: Floats
    is_poisson: bool

    @property
    def mean(self) -> Floats:
        """Shapes: returns (N, O)."""
        return np.einsum("nl,nlo->no", self.weight_NL, self.mean_NLO)

    @property
    def variance(self) -> Floats:
        """The experts' mean variance and the variance of their means; returns (N, O)."""
        between_NLO = (self.mean_NLO - self.mean[:, None]) ** 2
        return np.einsum("nl,nlo->no", self.weight_NL, self.variance_NLO + between_NLO)

    def cdf(self, y_NO: Floats) -> Floats:
        """Probability of at most `y_NO`, each output by itself; returns (N, O)."""
        if self.is_poisson:
            below_NLO = np.where(y_NO[:, None] < 0, 0.0, pdtr(np.maximum(np.floor(y_NO[:, None]), 0), self.mean_NLO))
        else:
            below_NLO = ndtr((y_NO[:, None] - self.mean_NLO) / np.sqrt(self.variance_NLO))
        return np.einsum("nl,nlo->no", self.weight_NL, below_NLO)

    def quantile(self, level: float | Sequence[float] | Floats) -> Floats:
        """The value that `level` of the distribution lies below; returns (N, O), or (K, N, O) for a list of K levels.

        Raises: ValueError unless every level is a number between 0 and 1, both excluded.
        """
        if np.ndim(level) == 1:
            return np.stack([self._quantile(one) for one in np.asarray(level).tolist()])
        return self._quantile(level)

    def _quantile(self, level: Any) -> Floats:
        if not isinstance(level, float | np.floating) or not 0 < level < 1:
            raise ValueError(f"level={level!r} must be between 0 and 1, both excluded, or a list of such numbers")
        # a mixture's quantile lies among those of its parts
        part_NLO = self._part_quantiles(float(level))
        low_NO, high_NO = part_NLO.min(axis=1), part_NLO.max(axis=1)
        for _ in range(HALVINGS):
            middle_NO = 0.5 * (low_NO + high_NO)
            is_above_NO = self.cdf(middle_NO) >= level
            low_NO, high_NO = np.where(is_above_NO, low_NO, middle_NO), np.where(is_above_NO, middle_NO, high_NO)
        return np.round(high_NO) if self.is_poisson else high_NO

    def _part_quantiles(self, level: float) -> Floats:
        if self.is_poisson:
            around_NLO = np.ceil(np.nan_to_num(pdtrik(level, self.mean_NLO)))
            return np.concatenate([around_NLO - 1.5, around_NLO + 1.0], axis=1)
        return self.mean_NLO + ndtri(level) * np.sqrt(self.variance_NLO)
