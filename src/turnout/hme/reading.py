"""How an estimator reads a table: checked, missing inputs filled, standardized, on its device, block by block."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from turnout.errors import ConfigError
from turnout.hme.checks import Scale, check_choice
from turnout.hme.mixture import Mixture
from turnout.hme.rows import Rows
from turnout.hme.space import NUMPY, NumpySpace, space_for
from turnout.hme.tree import Floats
from turnout.hme.workspace import Workspace

PREDICT_ROWS = 65_536  # rows predicted at once


class TableReader(BaseEstimator):
    """An estimator whose inputs are columns with a scale; what it does with them is left open."""

    n_features_in_: int
    mixture_: Mixture
    scale_: Scale
    target_scale_: Scale
    device: str | None
    missing: Literal["refuse", "mean"]

    def input_names(self, feature_names: Iterable[str] | None = None) -> list[str]:
        """Names of the inputs: those given, those of the DataFrame that was fitted, or x0, x1 and so on.

        Raises: ValueError for another number of names than of inputs.
        """
        check_is_fitted(self)
        seen = getattr(self, "feature_names_in_", [f"x{i}" for i in range(self.n_features_in_)])
        names = [str(name) for name in (seen if feature_names is None else feature_names)]
        if len(names) != self.n_features_in_:
            raise ValueError(f"{len(names)} feature_names for {self.n_features_in_} features")
        return names

    def standard_inputs(self, X: Any) -> Floats:
        """X (N, D) as gates and experts read it, standardized, with the constant last: (P, N), of numpy."""
        check_is_fitted(self)
        return self._standard(self._filled(self._inputs(X)), NUMPY)

    def _space(self) -> NumpySpace:
        """Where this estimator computes."""
        try:
            return space_for(self.device)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def _by_block(self, X: Any, answer: Callable[[Mixture, Floats], Floats]) -> Floats:
        """`answer` of the mixture to (P, N) standardized inputs, rows last there and first here, for all rows.

        It is asked where the estimator computes; what it says is brought to the host block by block.
        """
        check_is_fitted(self)
        space = self._space()
        x_ND, mixture = self._filled(self._inputs(X)), self.mixture_.on(space)
        starts = range(0, len(x_ND), PREDICT_ROWS)
        parts = (answer(mixture, self._standard(x_ND[start : start + PREDICT_ROWS], space)) for start in starts)
        return np.concatenate([np.moveaxis(NUMPY.asarray(part), -1, 0) for part in parts])

    def _standard(self, x_ND: Floats, space: NumpySpace) -> Floats:
        return space.ascontiguousarray(self.scale_.with_constant(space.asarray(x_ND)).T)

    def _checked(self, X: Any, sample_weight: Any, *, reset: bool) -> tuple[Floats, Floats]:
        x_ND = self._inputs(X, reset=reset)
        weight_N = _check_sample_weight(sample_weight, x_ND, dtype=np.float64, ensure_non_negative=True)
        return x_ND, weight_N

    def _inputs(self, X: Any, *, reset: bool = False) -> Floats:
        check_choice("missing", self.missing, ("refuse", "mean"))
        finite = True if self.missing == "refuse" else "allow-nan"
        return np.asarray(
            validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite=finite), dtype=np.float64
        )

    def _set_input_scale(self, x_ND: Floats, weight_N: Floats) -> Floats:
        """Learns by these rows what stands for missing inputs, and the scale; returns them filled."""
        if self.missing == "mean":
            self.fill_D_ = _means(x_ND, weight_N)
        x_ND = self._filled(x_ND)
        self.scale_ = Scale.of(x_ND, weight_N)
        return x_ND

    def _rows(self, x_ND: Floats, y_NT: Floats, weight_N: Floats, space: NumpySpace) -> Rows:
        """Rows whose blocks will lie in `space`."""
        return Rows(
            x_NP=x_ND, y_NT=self.target_scale_.standard(y_NT), weight_N=weight_N, scale=self.scale_,
            work=Workspace(space),
        )  # fmt: skip

    def _filled(self, x_ND: Floats) -> Floats:
        return np.where(np.isnan(x_ND), self.fill_D_, x_ND) if self.missing == "mean" else x_ND

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing == "mean"
        return tags


def _means(x_ND: Floats, weight_N: Floats) -> Floats:
    """Weighted means of what is there in each column; 0 for a column of which nothing is."""
    known_ND = ~np.isnan(x_ND)
    weight_D = weight_N @ known_ND
    return weight_N @ np.where(known_ND, x_ND, 0.0) / np.where(weight_D > 0, weight_D, 1.0)
