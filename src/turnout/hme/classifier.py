"""`HMEClassifier`: classes by a hierarchical mixture of logistic or softmax experts, with scikit-learn's contract."""

from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from turnout.hme.base import HMEBase
from turnout.hme.checks import Scale, check_given, unchanged_by_errors
from turnout.hme.families import Family, Softmax
from turnout.hme.tree import Floats


class HMEClassifier(ClassifierMixin, HMEBase):
    """Classification by a tree of gates over logistic (two classes) or softmax experts, fitted by EM.

    Settings are those of `HMERegressor` but for family and noise; fitted attributes are the same, and `classes_`.
    """

    def predict_proba(self, X: Any) -> Floats:
        """Probability of each class of `classes_`, (N, K); rows sum to 1."""
        return self._by_block(X, lambda x_PN: self.mixture_.mean(x_PN).T)

    def predict(self, X: Any) -> Any:
        """The likeliest class of each row."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Learn more rows on-line, by recursive Newton steps; after `fit` it goes on from the fit.

        A first call needs all `classes`, and sets the scale of columns.
        """
        first = not hasattr(self, "mixture_")
        with unchanged_by_errors(self):
            if first:
                self._read_classes(y if classes is None else classes, are_rows=classes is None)
            return self._partial_fit(X, y, sample_weight, first=first)

    def _read_classes(self, y: Any, *, are_rows: bool = True) -> None:
        check_given(y)
        if are_rows:
            check_classification_targets(y)
        self.classes_ = np.unique(column_or_1d(y, warn=True))
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has {len(self.classes_)} class ({self.classes_.tolist()}); a classifier needs at least two"
            )

    def _targets(self, y: Any, num_rows: int, *, reset: bool) -> Floats:
        if reset:
            self._read_classes(y)
        check_given(y)
        y_N = column_or_1d(y)
        if y_N.shape != (num_rows,):
            raise ValueError(f"X has {num_rows} rows and y shape {y_N.shape}: inconsistent numbers of samples")
        unknown = np.setdiff1d(y_N, self.classes_)
        if len(unknown):
            raise ValueError(f"y has classes {unknown.tolist()} that are not among classes {self.classes_.tolist()}")
        return (y_N[:, None] == self.classes_).astype(np.float64)

    def _family(self, targets: int) -> Family:
        return Softmax(targets=targets)

    def _target_scale(self, y_NT: Floats, weight_N: Floats) -> Scale:
        return Scale(mean_D=np.zeros(y_NT.shape[1]), deviation_D=np.ones(y_NT.shape[1]))

    def _target_names(self) -> list[str]:
        return [str(name) for name in self.classes_]
