"""`HMERegressor` and `HMEClassifier`: hierarchical mixtures of experts with scikit-learn's contract."""

from abc import abstractmethod
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

from turnout.errors import ConfigError
from turnout.hme.ascent import AscentConfig, fit_ascent
from turnout.hme.checks import Scale, check_choice, check_experts, check_positive
from turnout.hme.distribution import Predictive
from turnout.hme.em import EMConfig
from turnout.hme.families import Family, Gaussian, Poisson, Softmax
from turnout.hme.mixture import new_mixture
from turnout.hme.online import OnlineConfig, Recursion, learn_rows
from turnout.hme.solve import SOLVERS, SolveConfig, solve
from turnout.hme.sweep import Rows
from turnout.hme.text import tree_text
from turnout.hme.tree import Floats, Tree

PREDICT_ROWS = 65_536  # rows predicted at once


class _HME(BaseEstimator):
    """What both estimators share: settings, fitting, responsibilities."""

    def __init__(
        self,
        depth: int = 2,
        branching: int = 2,
        *,
        solver: Literal["em", "least_squares", "gradient", "online"] = "em",
        max_iter: int = 100,
        tol: float = 1e-5,
        newton_steps: int = 1,
        ridge: float = 1e-3,
        n_init: int = 1,
        max_experts: int | None = None,
        prune: bool = False,
        error: Literal["mixture", "competition", "cooperation"] = "mixture",
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        batch_size: int = 32,
        forgetting: float = 0.99,
        missing: Literal["refuse", "mean"] = "refuse",
        random_state: Any = None,
    ) -> None:
        self.depth = depth
        self.branching = branching
        self.solver = solver
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

        Raises: ValueError for NaN or infinite input, fewer rows than experts, or a setting out of range.
        """
        x_ND, weight_N = self._checked(X, sample_weight, reset=True)
        y_NT = self._targets(y, len(x_ND))
        kept_N = weight_N > 0
        x_ND, y_NT, weight_N = x_ND[kept_N], y_NT[kept_N], weight_N[kept_N]
        rows = self._started(x_ND, y_NT, weight_N)
        tree, config = self._tree(), self._config()
        check_experts(len(rows), max(tree.num_leaves, 1))
        fit = solve(tree, self._family(y_NT.shape[1]), rows, config, self._random())
        self.mixture_, self.recursion_ = fit.mixture, None
        # densities of standardized targets, in the units of y
        unit = float(rows.weight_N.sum() * np.log(self.target_scale_.deviation_D).sum())
        self.loglik_path_ = np.array(fit.loglik_path) - unit
        self.objective_path_ = np.array(fit.objective_path) - unit
        self.n_iter_, self.n_passes_, self.converged_ = max(1, len(fit.loglik_path) - 1), fit.passes, fit.converged
        return self

    def apply(self, X: Any) -> Floats:
        """How responsible each expert is for each row before its target is seen: (N, L), rows sum to 1."""
        return self._by_block(X, lambda x_PN: self.mixture_.priors(x_PN).T)

    def export_text(self, feature_names: list[str] | None = None) -> str:
        """The tree as text: what each gate asks and what each expert says, in the inputs' own units."""
        check_is_fitted(self)
        names = feature_names or [str(n) for n in getattr(self, "feature_names_in_", [])]
        names = names or [f"x{i}" for i in range(self.n_features_in_)]
        if len(names) != self.n_features_in_:
            raise ValueError(f"{len(names)} feature_names for {self.n_features_in_} features")
        return tree_text(self.mixture_, self.scale_, self.target_scale_, names, self._target_names())

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, *, first: bool) -> Self:
        x_ND, weight_N = self._checked(X, sample_weight, reset=first)
        y_NT = self._targets(y, len(x_ND))
        if first:
            rows = self._started(x_ND, y_NT, weight_N)
            family = self._family(y_NT.shape[1])
            self.mixture_ = new_mixture(
                self._tree(), family, rows.y_NT.T, rows.weight_N, rows.x_NP.shape[1], self._random()
            )
            self.recursion_ = None
            self.n_iter_ = 0
        rows = Rows(x_NP=self.scale_.with_constant(x_ND), y_NT=self.target_scale_.standard(y_NT), weight_N=weight_N)
        self._learn(rows)
        self.n_iter_ += 1
        return self

    def _learn(self, rows: Rows) -> None:
        config = self._config()
        if isinstance(self.mixture_.family, Gaussian):
            state = Recursion.start(self.mixture_, config.online) if self.recursion_ is None else self.recursion_
            self.recursion_ = learn_rows(state, rows, config.online)
            self.mixture_ = self.recursion_.mixture
            return
        ascent = AscentConfig(
            learning_rate=self.learning_rate, momentum=self.momentum, batch_size=self.batch_size, max_iter=1,
            ridge=self.ridge,
        )  # fmt: skip
        self.mixture_ = fit_ascent(self.mixture_, rows, ascent, self._random(), keep_last=True).mixture

    def _checked(self, X: Any, sample_weight: Any, *, reset: bool) -> tuple[Floats, Floats]:
        x_ND = self._inputs(X, reset=reset)
        weight_N = _check_sample_weight(sample_weight, x_ND, dtype=np.float64, ensure_non_negative=True)
        return x_ND, weight_N

    def _inputs(self, X: Any, *, reset: bool = False) -> Floats:
        check_choice("missing", self.missing, ("refuse", "mean"))
        finite = True if self.missing == "refuse" else "allow-nan"
        return validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite=finite)

    def _started(self, x_ND: Floats, y_NT: Floats, weight_N: Floats) -> Rows:
        """Sets the scales by these rows, and returns them standardized."""
        self.fill_D_ = _means(x_ND, weight_N)
        x_ND = self._filled(x_ND)
        self.scale_ = Scale.of(x_ND, weight_N)
        self.target_scale_ = self._target_scale(y_NT, weight_N)
        return Rows(x_NP=self.scale_.with_constant(x_ND), y_NT=self.target_scale_.standard(y_NT), weight_N=weight_N)

    def _filled(self, x_ND: Floats) -> Floats:
        return np.where(np.isnan(x_ND), self.fill_D_, x_ND) if self.missing == "mean" else x_ND

    def _by_block(self, X: Any, answer: Any) -> Floats:
        """`answer` of (P, N) standardized inputs, gathered over blocks of rows."""
        check_is_fitted(self)
        x_ND = self._filled(self._inputs(X))
        parts = (x_ND[start : start + PREDICT_ROWS] for start in range(0, len(x_ND), PREDICT_ROWS))
        return np.concatenate([answer(np.ascontiguousarray(self.scale_.with_constant(part).T)) for part in parts])

    def _tree(self) -> Tree:
        try:
            return Tree.complete(self.depth, self.branching)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def _random(self) -> np.random.Generator:
        return np.random.default_rng(check_random_state(self.random_state).randint(2**31))

    def _config(self) -> SolveConfig:
        check_choice("solver", self.solver, SOLVERS)
        check_positive("ridge", self.ridge)
        check_positive("max_iter", self.max_iter, 1)
        try:
            return SolveConfig(
                solver=self.solver,
                em=EMConfig(
                    algorithm=2 if self.solver == "least_squares" else 1, max_iter=self.max_iter, tol=self.tol,
                    newton_steps=self.newton_steps, ridge=self.ridge,
                ),
                ascent=AscentConfig(
                    error=self.error, learning_rate=self.learning_rate, momentum=self.momentum,
                    batch_size=self.batch_size, max_iter=self.max_iter, tol=self.tol, ridge=self.ridge,
                ),
                online=OnlineConfig(forgetting=self.forgetting),
                online_passes=min(self.max_iter, 10),
                restarts=self.n_init, most_leaves=self.max_experts or 0, prune=self.prune,
            )  # fmt: skip
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing == "mean"
        return tags

    @abstractmethod
    def _targets(self, y: Any, num_rows: int) -> Floats: ...

    @abstractmethod
    def _family(self, targets: int) -> Family: ...

    @abstractmethod
    def _target_scale(self, y_NT: Floats, weight_N: Floats) -> Scale: ...

    @abstractmethod
    def _target_names(self) -> list[str]: ...


class HMERegressor(RegressorMixin, _HME):
    """Regression by a tree of gates over linear experts, fitted by EM.

    `depth` and `branching` give branching ** depth experts; depth 1 is the flat mixture of 1991. `noise` is the form of
    each expert's covariance (unit, scalar, diagonal, full); `family="poisson"` takes counts. `max_experts` grows the
    tree, `prune` shrinks it. Fitted: `mixture_`, `loglik_path_` (nats, before each iteration and after the last),
    `objective_path_` (with the log prior of ridge and noise, which EM never lowers), `n_iter_`, `n_passes_` (passes over
    the rows), `converged_`.
    Source: Jordan & Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm"; Jacobs et al. 1991.
    """

    def __init__(
        self,
        depth: int = 2,
        branching: int = 2,
        *,
        family: Literal["gaussian", "poisson"] = "gaussian",
        noise: Literal["unit", "scalar", "diagonal", "full"] = "scalar",
        solver: Literal["em", "least_squares", "gradient", "online"] = "em",
        max_iter: int = 100,
        tol: float = 1e-5,
        newton_steps: int = 1,
        ridge: float = 1e-3,
        n_init: int = 1,
        max_experts: int | None = None,
        prune: bool = False,
        error: Literal["mixture", "competition", "cooperation"] = "mixture",
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        batch_size: int = 32,
        forgetting: float = 0.99,
        missing: Literal["refuse", "mean"] = "refuse",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            depth, branching, solver=solver, max_iter=max_iter, tol=tol, newton_steps=newton_steps, ridge=ridge,
            n_init=n_init, max_experts=max_experts, prune=prune, error=error, learning_rate=learning_rate,
            momentum=momentum, batch_size=batch_size, forgetting=forgetting, missing=missing,
            random_state=random_state,
        )  # fmt: skip
        self.family = family
        self.noise = noise

    def predict(self, X: Any) -> Floats:
        """Mean of the mixture: (N,), or (N, O) where y had columns."""
        check_is_fitted(self)
        scale = self.target_scale_
        mean_NO = self._by_block(X, lambda x_PN: self.mixture_.mean(x_PN).T) * scale.deviation_D + scale.mean_D
        return mean_NO[:, 0] if self.is_column_ else mean_NO

    def predict_dist(self, X: Any) -> Predictive:
        """The mixture itself, for mean, variance and quantiles of each row."""
        check_is_fitted(self)
        scale, mixture = self.target_scale_, self.mixture_
        mean_NLO = self._by_block(X, lambda x_PN: mixture.family.mean(x_PN, mixture.experts).transpose(2, 0, 1))
        mean_NLO = mean_NLO * scale.deviation_D + scale.mean_D
        is_poisson = isinstance(mixture.family, Poisson)
        variance_LO = np.diagonal(mixture.experts.covariance_LOO, axis1=1, axis2=2) * scale.deviation_D**2
        return Predictive(
            weight_NL=self.apply(X),
            mean_NLO=mean_NLO,
            variance_NLO=mean_NLO if is_poisson else np.broadcast_to(variance_LO, mean_NLO.shape),
            is_poisson=is_poisson,
        )

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn more rows on-line: recursive least squares (Gaussian experts), or gradient ascent (Poisson).

        The first call sets the scale of all columns.
        """
        return self._partial_fit(X, y, sample_weight, first=not hasattr(self, "mixture_"))

    def _targets(self, y: Any, num_rows: int) -> Floats:
        check_choice("family", self.family, ("gaussian", "poisson"))
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        y_NT = _numbers(y)
        self.is_column_ = y_NT.ndim == 1
        y_NT = y_NT.reshape(len(y_NT), -1)
        if len(y_NT) != num_rows:
            raise ValueError(f"X has {num_rows} rows and y {len(y_NT)}: inconsistent numbers of samples")
        if self.family == "poisson" and (y_NT.shape[1] > 1 or (y_NT < 0).any()):
            raise ValueError("family='poisson' needs one column of counts, none below 0")
        return y_NT

    def _family(self, targets: int) -> Family:
        try:
            return Poisson() if self.family == "poisson" else Gaussian(targets=targets, noise=self.noise)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def _target_scale(self, y_NT: Floats, weight_N: Floats) -> Scale:
        if self.family == "poisson":
            return Scale(mean_D=np.zeros(1), deviation_D=np.ones(1))
        return Scale.of(y_NT, weight_N)

    def _target_names(self) -> list[str]:
        return [f"y{i}" if len(self.target_scale_.mean_D) > 1 else "y" for i in range(len(self.target_scale_.mean_D))]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = self.family == "gaussian"
        tags.target_tags.positive_only = self.family == "poisson"
        return tags


class HMEClassifier(ClassifierMixin, _HME):
    """Classification by a tree of gates over logistic (two classes) or softmax experts, fitted by EM.

    Settings and fitted attributes are those of `HMERegressor`; `solver="online"` learns by gradient.
    """

    def predict_proba(self, X: Any) -> Floats:
        """Probability of each class of `classes_`, (N, K); rows sum to 1."""
        return self._by_block(X, lambda x_PN: self.mixture_.mean(x_PN).T)

    def predict(self, X: Any) -> Any:
        """The likeliest class of each row."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the tree to X (N, D) and classes y (N,).

        Raises: ValueError for one class, NaN or infinite input, fewer rows than experts, or a setting out of range.
        """
        self._inputs(X, reset=True)
        self._read_classes(y)
        return super().fit(X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Learn more rows by gradient ascent; the first call needs all `classes`, and sets the scale of columns."""
        first = not hasattr(self, "mixture_")
        if first:
            self._read_classes(y if classes is None else classes)
        return self._partial_fit(X, y, sample_weight, first=first)

    def _read_classes(self, y: Any) -> None:
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        check_classification_targets(y)
        self.classes_ = np.unique(column_or_1d(y, warn=True))
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has {len(self.classes_)} class ({list(self.classes_)}); a classifier needs at least two"
            )

    def _targets(self, y: Any, num_rows: int) -> Floats:
        y_N = column_or_1d(y)
        if y_N.shape != (num_rows,):
            raise ValueError(f"X has {num_rows} rows and y shape {y_N.shape}: inconsistent numbers of samples")
        unknown = np.setdiff1d(y_N, self.classes_)
        if len(unknown):
            raise ValueError(f"y has classes {list(unknown)} that are not among classes {list(self.classes_)}")
        return (y_N[:, None] == self.classes_).astype(np.float64)

    def _family(self, targets: int) -> Family:
        if self.solver == "online":
            raise ValueError("solver='online' is for HMERegressor; classes are learned on-line by partial_fit")
        return Softmax(targets=targets)

    def _target_scale(self, y_NT: Floats, weight_N: Floats) -> Scale:
        return Scale(mean_D=np.zeros(y_NT.shape[1]), deviation_D=np.ones(y_NT.shape[1]))

    def _target_names(self) -> list[str]:
        return [str(name) for name in self.classes_]


def _means(x_ND: Floats, weight_N: Floats) -> Floats:
    """Weighted means of what is there in each column; 0 for a column of which nothing is."""
    known_ND = ~np.isnan(x_ND)
    weight_D = weight_N @ known_ND
    return weight_N @ np.where(known_ND, x_ND, 0.0) / np.where(weight_D > 0, weight_D, 1.0)


def _numbers(y: Any) -> Floats:
    y_NT = np.asarray(y)
    if y_NT.dtype.kind not in "fiub":
        y_NT = y_NT.astype(np.float64)
    if y_NT.ndim not in (1, 2) or np.iscomplexobj(y_NT):
        raise ValueError(f"y has shape {y_NT.shape}; it must be a column, or rows by outputs, of real numbers")
    if not np.isfinite(y_NT).all():
        raise ValueError("Input y contains NaN or infinity; leave out these rows")
    return y_NT.astype(np.float64)
