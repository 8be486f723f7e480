"""Ugly data: a clear error or a sane fit, and never a parameter that is no number."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from turnout.hme import HMEClassifier, HMERegressor
from turnout.hme.checks import newton_bytes

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(60, 3))
Y = X[:, 0] + RANDOM.normal(size=60)
SETTINGS = [{"noise": noise} for noise in ("unit", "scalar", "diagonal", "full")]
SETTINGS += [{"solver": solver, "max_iter": 5} for solver in ("least_squares", "gradient", "online")]
SETTINGS += [{"ridge": 0.0}, {"newton_steps": 20}, {"depth": 1, "branching": 4, "ridge": 0.0}]


def _finite(fitted: Any) -> bool:
    mixture = fitted.mixture_
    arrays = (mixture.gate_GPO, mixture.experts.weight_LPO, mixture.experts.covariance_LOO, fitted.loglik_path_)
    return all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("name", "x_ND", "y_N"),
    [
        ("a constant column", np.column_stack([X, np.full(60, 7.0)]), Y),
        ("only constant columns", np.ones((60, 2)), Y),
        ("a column twice", np.column_stack([X, X[:, 0]]), Y),
        ("all rows alike", np.ones((60, 3)), np.ones(60)),
        ("a constant target", X, np.full(60, 3.0)),
        ("rows thirty times", np.repeat(X[:5], 12, axis=0), np.repeat(Y[:5], 12)),
        ("an exact fit", X, X @ (1, 2, 3)),
        ("huge and tiny units", X * (1e12, 1e-12, 1), Y * 1e9),
        ("a constant column of tiny numbers", np.column_stack([X, np.full(60, 1e-200)]), Y),
        ("an outlier", X, np.where(np.arange(60) == 3, 1e8, Y)),
        ("as many rows as experts", X[:4], Y[:4]),
    ],
)
def test_ugly_rows_give_a_finite_fit(settings: dict[str, Any], name: str, x_ND: np.ndarray, y_N: np.ndarray) -> None:
    fitted = HMERegressor(**settings, random_state=0).fit(x_ND, y_N)
    assert _finite(fitted), name
    assert np.isfinite(fitted.predict(x_ND)).all(), name


@pytest.mark.parametrize("ridge", [1e-3, 0.0])
@pytest.mark.parametrize("steps", [1, 20])
def test_separable_classes_give_a_finite_fit(ridge: float, steps: int) -> None:
    y_N = X[:, 0] > 0
    fitted = HMEClassifier(ridge=ridge, newton_steps=steps, random_state=0).fit(X, y_N)
    assert _finite(fitted)
    assert fitted.score(X, y_N) == 1
    assert np.isfinite(fitted.predict_proba(X)).all()


@pytest.mark.parametrize(
    ("settings", "x_ND", "y_N", "message"),
    [
        ({}, np.where(X > 2, np.nan, X), Y, "contains NaN"),
        ({}, X, np.where(Y > 2, np.inf, Y), "NaN or infinity; leave out"),
        ({}, X[:3], Y[:3], r"3 rows \(n_samples=3\) cannot fit 4 experts; give at least one row for each"),
        ({"depth": -1}, X, Y, "depth must be at least 0"),
        ({"depth": 40}, X, Y, "at most 65536 experts"),
        ({"branching": 1}, X, Y, "branching at least 2"),
        ({"noise": "huge"}, X, Y, "must be one of: unit, scalar, diagonal, full"),
        ({"solver": "magic"}, X, Y, "must be one of: em, least_squares, gradient, online"),
        ({"error": "magic"}, X, Y, "unknown error function 'magic'; available"),
        ({"ridge": -1.0}, X, Y, "ridge=-1.0 must be a finite number of at least 0"),
        ({"family": "poisson"}, X, Y, "needs one column of counts, none below 0"),
        ({"missing": "guess"}, X, Y, "must be one of: refuse, mean"),
        ({"max_experts": 8, "solver": "online"}, X, Y, "growth and pruning need solver='em'"),
        ({"max_experts": 3}, X, Y, "max_experts=3 must be at least the 4 experts that depth and branching start with"),
        ({"max_experts": -8}, X, Y, "max_experts=-8 must be at least"),
        ({"max_iter": 2.5}, X, Y, r"max_iter=2\.5 must be a whole number"),
        ({"n_init": 1.5}, X, Y, r"n_init=1\.5 must be a whole number"),
        ({"newton_steps": "2"}, X, Y, "newton_steps='2' must be a whole number"),
        ({"batch_size": 1.5, "solver": "online"}, X, Y, r"batch_size=1\.5 must be a whole number"),
        ({"hold_noise": 1.5}, X, Y, r"hold_noise=1\.5 must be a whole number"),
        ({"tol": "small"}, X, Y, "tol='small' must be a finite number"),
        ({"momentum": None}, X, Y, "momentum=None must be a finite number"),
        ({"forgetting": "x"}, X, Y, "forgetting='x' must be a finite number"),
        ({"learning_rate": float("inf"), "solver": "gradient"}, X, Y, "learning_rate=inf must be a finite number"),
        ({"error": "competition"}, X, Y, "error='competition' is what solver='gradient' can climb, not 'em'"),
        ({"depth": 1.5}, X, Y, "depth=1.5 must be a whole number"),
        ({"branching": "2"}, X, Y, "branching='2' must be a whole number"),
        ({}, X * 1e200, Y, "vary by more than 1e.75, and their squares overflow: divide"),
        ({}, X, Y * 1e200, "their squares overflow"),
        ({}, X * (1, 1e-200, 1), Y, "vary by less than 1e-75, and their squares vanish: multiply"),
        ({}, X, Y * 1e-200, "their squares vanish"),
        (
            {"family": "poisson"},
            X,
            np.where(Y > 0, 1e15, 3),
            r"counts of up to 1e\+12, not 1e\+15; .*family='gaussian'",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(
    settings: dict[str, Any], x_ND: np.ndarray, y_N: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HMERegressor(**settings).fit(x_ND, y_N)


def test_what_would_need_matrices_of_many_gigabytes_is_refused_and_gradients_need_none() -> None:
    wide_ND = RANDOM.normal(size=(60, 4000))
    with pytest.raises(
        ValueError, match=r"4 experts of 1 outputs and 3 gates over 4000 inputs need 2\.7 GiB for a step"
    ):
        HMERegressor().fit(wide_ND, Y)
    with pytest.raises(ValueError, match="fewer classes"):
        HMEClassifier().partial_fit(X, np.arange(60) % 7, classes=np.arange(2000))
    with pytest.raises(ValueError, match="solver='gradient', which needs no such matrices"):
        HMEClassifier(6, 2, max_iter=1).fit(np.repeat(wide_ND[:, :400], 5, axis=0), np.arange(300) % 20)
    with pytest.raises(ValueError, match="64 experts of 1 outputs and 63 gates over 1000 inputs"):
        HMERegressor(0, max_experts=64).fit(wide_ND[:, :1000], Y)
    fitted = HMERegressor(solver="gradient", max_iter=3, random_state=0).fit(wide_ND, Y)
    assert _finite(fitted)
    with pytest.raises(ValueError, match="GiB for a step"):
        fitted.partial_fit(wide_ND, Y)


def test_memory_of_many_inputs_is_that_of_the_matrices_of_a_step() -> None:
    """Products of pairs of 700 inputs would be 251 MB for 128 rows."""
    wide_ND = RANDOM.normal(size=(200, 700))
    tracemalloc.start()
    fitted = HMERegressor(1, max_iter=2, random_state=0).fit(wide_ND, wide_ND[:, 0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * newton_bytes(2, 2, fitted.mixture_.family, 701) + 2 * wide_ND.nbytes
    assert fitted.score(wide_ND, wide_ND[:, 0]) > 0.99


def test_one_class_is_refused_and_so_are_weights_of_zero() -> None:
    with pytest.raises(ValueError, match=r"y has 1 class \(\[0.0\]\)"):
        HMEClassifier().fit(X, np.zeros(60))
    with pytest.raises(ValueError, match="at least one non-zero number"):
        HMERegressor().fit(X, Y, np.zeros(60))


def test_rows_beyond_squares_leave_what_was_learned() -> None:
    fitted = HMERegressor(random_state=0).partial_fit(X, Y)
    before = fitted.predict(X)
    with pytest.raises(ValueError, match="their squares overflow"):
        fitted.partial_fit(X * 1e200, Y)
    np.testing.assert_array_equal(fitted.predict(X), before)


@pytest.mark.parametrize("refused", [(100 * X[:3], Y[:3]), (X[:, :2], np.column_stack([Y, Y])[:59]), (X, None)])
def test_a_fit_that_is_refused_leaves_the_one_before(refused: tuple[Any, Any]) -> None:
    for estimator in (HMERegressor(random_state=0, max_iter=3), HMEClassifier(random_state=0, max_iter=3)):
        fitted = estimator.fit(X, Y > 0)
        before = fitted.predict(X)
        for again in (fitted.fit, fitted.partial_fit):
            if again is fitted.fit or refused[1] is None:
                with pytest.raises(
                    ValueError, match=r"cannot fit 4 experts|inconsistent|y has|but the target y is None"
                ):
                    again(*refused)
        np.testing.assert_array_equal(fitted.predict(X), before)


@pytest.mark.parametrize("refused", [np.column_stack([Y, Y]), np.where(Y > 2, np.nan, Y)])
def test_targets_that_are_refused_leave_the_shape_of_predictions(refused: np.ndarray) -> None:
    fitted = HMERegressor(random_state=0, max_iter=3).fit(X, Y)
    with pytest.raises(ValueError, match=r"y has 2 columns|NaN or infinity"):
        fitted.partial_fit(X, refused)
    assert fitted.predict(X).shape == (60,)
    assert fitted.partial_fit(X, Y[:, None]).predict(X).shape == (60,)


def test_missing_inputs_are_taken_as_the_mean_when_asked() -> None:
    holes_ND = np.where(RANDOM.random(X.shape) < 0.2, np.nan, X)
    holes_ND = np.column_stack([holes_ND, np.full(60, np.nan)])
    fitted = HMERegressor(1, missing="mean", random_state=0).fit(holes_ND, Y)
    assert _finite(fitted)
    filled_ND = np.where(np.isnan(holes_ND), np.append(np.nanmean(holes_ND[:, :3], axis=0), 0), holes_ND)
    np.testing.assert_allclose(fitted.predict(holes_ND), fitted.predict(filled_ND))


def test_an_error_that_does_not_fit_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="they need Gaussian experts"):
        HMEClassifier(solver="gradient", error="competition").fit(X, X[:, 0] > 0)


@pytest.mark.parametrize("error", ["mixture", "competition", "cooperation"])
def test_each_error_of_1991_lowers_what_it_measures(error: str) -> None:
    x_ND = np.random.default_rng(1).normal(size=(400, 2))
    y_N = np.abs(x_ND[:, 0])
    fitted = HMERegressor(1, 2, solver="gradient", error=error, max_iter=20, random_state=0).fit(x_ND, y_N)
    assert fitted.objective_path_[-1] > fitted.objective_path_[0]
    assert fitted.score(x_ND, y_N) > 0.5
    assert _finite(fitted)
