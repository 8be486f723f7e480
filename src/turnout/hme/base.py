"""What `HMERegressor` and `HMEClassifier` share: settings, fitting, responsibilities."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from turnout.errors import ConfigError
from turnout.hme.checks import (
    MOST_NEWTON_BYTES,
    Scale,
    check_choice,
    check_experts,
    check_most_experts,
    check_newton,
    check_size,
    check_whole,
    newton_bytes,
    unchanged_by_errors,
)
from turnout.hme.families import Family
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.online import Recursion, learn_rows
from turnout.hme.settings import solve_config
from turnout.hme.solve import solve
from turnout.hme.sweep import Rows, loglik
from turnout.hme.text import tree_text
from turnout.hme.tree import Floats, Tree

PREDICT_ROWS = 65_536  # rows predicted at once


class HMEBase(BaseEstimator):
    """A tree of gates and experts with scikit-learn's contract; the family of the experts is left open."""

    n_features_in_: int
    mixture_: Mixture
    scale_: Scale
    target_scale_: Scale
    recursion_: Recursion | None
    hold_noise: int = 0  # a setting of the regressor alone: other experts have no noise

    def __init__(
        self,
        depth: int = 2,
        branching: int = 2,
        *,
        solver: Literal["em", "least_squares", "gradient", "online"] = "em",
        max_iter: int | None = None,
        tol: float = 1e-5,
        newton_steps: int = 1,
        ridge: float = 1e-3,
        n_init: int = 1,
        max_experts: int | None = None,
        prune: bool = False,
        error: Literal["mixture", "competition", "cooperation"] = "mixture",
        learning_rate: float = 0.02,
        momentum: float = 0.9,
        batch_size: int = 32,
        forgetting: float = 0.99,
        missing: Literal["refuse", "mean"] = "refuse",
        random_state: Any = None,
    ) -> None:
        self.depth = depth
        self.branching = branching
        self.solver: Literal["em", "least_squares", "gradient", "online"] = solver
        self.max_iter = max_iter
        self.tol = tol
        self.newton_steps = newton_steps
        self.ridge = ridge
        self.n_init = n_init
        self.max_experts = max_experts
        self.prune = prune
        self.error = error
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.forgetting = forgetting
        self.missing = missing
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the tree to X (N, D) and y; rows count `sample_weight` times.

        Raises: ValueError for NaN or infinite input, one class, fewer rows than experts, or a setting out of range; the
        estimator is then as it was.
        """
        with unchanged_by_errors(self):
            return self._fit(X, y, sample_weight)

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Self:
        x_ND, weight_N = self._checked(X, sample_weight, reset=True)
        y_NT = self._targets(y, len(x_ND), reset=True)
        if not weight_N.all():
            kept_N = weight_N > 0
            x_ND, y_NT, weight_N = x_ND[kept_N], y_NT[kept_N], weight_N[kept_N]
        rows = self._started(x_ND, y_NT, weight_N)
        tree, config = self._tree(), solve_config(self)
        check_experts(len(rows), max(tree.num_leaves, 1))
        check_most_experts(self.max_experts, tree.num_leaves)
        family = self._family(y_NT.shape[1])
        if self.solver != "gradient":
            most_experts = max(tree.num_leaves, self.max_experts or 0)
            check_newton(most_experts, self.branching, family, rows.num_inputs)
        try:
            fit = solve(tree, family, rows, config, self._random())
        except ConfigError as error:
            raise ValueError(str(error)) from error
        self.mixture_ = fit.mixture
        step_bytes = newton_bytes(fit.mixture.tree.num_leaves, self.branching, family, rows.num_inputs)
        # what the rows taught, for `partial_fit` to go on from
        fits = step_bytes <= MOST_NEWTON_BYTES
        self.recursion_ = Recursion.after(fit.mixture, rows, config.online) if fits else None
        # densities of standardized targets, in the units of y
        unit = float(rows.weight_N.sum() * np.log(self.target_scale_.deviation_D).sum())
        self.loglik_path_ = np.array(fit.loglik_path) - unit
        self.objective_path_ = np.array(fit.objective_path) - unit
        self.loglik_ = loglik(rows, fit.mixture) - unit
        self.n_iter_, self.n_passes_, self.converged_ = max(1, len(fit.loglik_path) - 1), fit.passes, fit.converged
        return self

    def apply(self, X: Any) -> Floats:
        """How responsible each expert is for each row before its target is seen: (N, L), rows sum to 1."""
        return self._by_block(X, lambda x_PN: self.mixture_.priors(x_PN).T)

    def export_text(self, feature_names: Iterable[str] | None = None, target_names: Iterable[str] | None = None) -> str:
        """The tree as text: what each gate asks and what each expert says, in the inputs' own units.

        `target_names`: of the outputs, or of all classes in the order of `classes_`.
        """
        check_is_fitted(self)
        names = self.input_names(feature_names)
        targets = self._target_names() if target_names is None else list(target_names)
        if len(targets) != self.mixture_.family.targets:
            raise ValueError(f"{len(targets)} target_names for {self.mixture_.family.targets} targets")
        return tree_text(self.mixture_, self.scale_, self.target_scale_, names, targets)

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

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, *, first: bool) -> Self:
        x_ND, weight_N = self._checked(X, sample_weight, reset=first)
        y_NT = self._targets(y, len(x_ND), reset=False)
        if not first and y_NT.shape[1] != self.mixture_.family.targets:
            raise ValueError(f"y has {y_NT.shape[1]} columns; the rows before had {self.mixture_.family.targets}")
        if first:
            rows = self._started(x_ND, y_NT, weight_N)
            family = self._family(y_NT.shape[1])
            check_newton(self._tree().num_leaves, self.branching, family, rows.num_inputs)
            self.mixture_ = new_mixture(
                self._tree(), family, rows.y_NT.T, rows.weight_N, rows.num_inputs, self._random()
            )
            self.recursion_ = Recursion.start(self.mixture_, solve_config(self).online)
            self.n_iter_ = 0
        if self.recursion_ is None:
            tree = self.mixture_.tree
            check_newton(tree.num_leaves, tree.branching, self.mixture_.family, x_ND.shape[1] + 1)
        assert self.recursion_ is not None
        x_ND = self._filled(x_ND)
        rows = self._rows(x_ND, y_NT, weight_N)
        check_size(self.scale_.standard(x_ND))
        check_size(rows.y_NT)
        self.recursion_ = learn_rows(self.recursion_, rows, solve_config(self).online)
        self.mixture_ = self.recursion_.mixture
        self.n_iter_ += 1
        return self

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

    def _started(self, x_ND: Floats, y_NT: Floats, weight_N: Floats) -> Rows:
        """Sets the scales by these rows, and returns them with these."""
        if self.missing == "mean":
            self.fill_D_ = _means(x_ND, weight_N)
        x_ND = self._filled(x_ND)
        self.scale_ = Scale.of(x_ND, weight_N)
        self.target_scale_ = self._target_scale(y_NT, weight_N)
        return self._rows(x_ND, y_NT, weight_N)

    def _rows(self, x_ND: Floats, y_NT: Floats, weight_N: Floats) -> Rows:
        return Rows(x_NP=x_ND, y_NT=self.target_scale_.standard(y_NT), weight_N=weight_N, scale=self.scale_)

    def _filled(self, x_ND: Floats) -> Floats:
        return np.where(np.isnan(x_ND), self.fill_D_, x_ND) if self.missing == "mean" else x_ND

    def _by_block(self, X: Any, answer: Any) -> Floats:
        """`answer` of (P, N) standardized inputs, gathered over blocks of rows."""
        check_is_fitted(self)
        x_ND = self._filled(self._inputs(X))
        parts = (x_ND[start : start + PREDICT_ROWS] for start in range(0, len(x_ND), PREDICT_ROWS))
        return np.concatenate([answer(self._standard(part)) for part in parts])

    def standard_inputs(self, X: Any) -> Floats:
        """X (N, D) as gates and experts read it, standardized, with the constant last: (P, N)."""
        check_is_fitted(self)
        return self._standard(self._filled(self._inputs(X)))

    def _standard(self, x_ND: Floats) -> Floats:
        return np.ascontiguousarray(self.scale_.with_constant(x_ND).T)

    def _tree(self) -> Tree:
        check_whole("depth", self.depth)
        check_whole("branching", self.branching)
        try:
            return Tree.complete(self.depth, self.branching)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def _random(self) -> np.random.Generator:
        return np.random.default_rng(check_random_state(self.random_state).randint(2**31))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing == "mean"
        return tags

    @abstractmethod
    def _targets(self, y: Any, num_rows: int, *, reset: bool) -> Floats:
        """Targets as floats (N, T); `reset` reads from them what a first fit learns of y."""

    @abstractmethod
    def _family(self, targets: int) -> Family: ...

    @abstractmethod
    def _target_scale(self, y_NT: Floats, weight_N: Floats) -> Scale: ...

    @abstractmethod
    def _target_names(self) -> list[str]: ...


def _means(x_ND: Floats, weight_N: Floats) -> Floats:
    """Weighted means of what is there in each column; 0 for a column of which nothing is."""
    known_ND = ~np.isnan(x_ND)
    weight_D = weight_N @ known_ND
    return weight_N @ np.where(known_ND, x_ND, 0.0) / np.where(weight_D > 0, weight_D, 1.0)
