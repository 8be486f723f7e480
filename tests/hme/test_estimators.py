"""The scikit-learn contract, and equality with scikit-learn where a tree is one expert."""

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from turnout.hme import HMEClassifier, HMERegressor


@parametrize_with_checks(
    [
        HMERegressor(max_iter=15, random_state=0),
        HMEClassifier(max_iter=15, random_state=0),
        HMERegressor(1, 3, noise="full", missing="mean", max_iter=15, random_state=0),
    ]
)
def test_the_contract_of_scikit_learn_holds(estimator: Any, check: Any) -> None:
    check(estimator)


def _bent(num_rows: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x_ND = random.normal(size=(num_rows, 3)) * (1, 5, 0.1) + (0, 3, -2)
    return x_ND, np.abs(x_ND[:, 0]) * 3 + 0.5 * x_ND[:, 1] + 0.1 * random.normal(size=num_rows)


@pytest.mark.parametrize("noise", ["unit", "scalar", "diagonal", "full"])
def test_one_expert_is_ordinary_least_squares(noise: str) -> None:
    x_ND, y_N = _bent()
    y_NO = np.column_stack([y_N, x_ND @ (1, 2, 3)])
    weight_N = np.random.default_rng(1).uniform(0.1, 2, len(y_N))
    got = HMERegressor(0, noise=noise, ridge=0).fit(x_ND, y_NO, weight_N).predict(x_ND)
    np.testing.assert_allclose(got, LinearRegression().fit(x_ND, y_NO, weight_N).predict(x_ND), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
def test_one_expert_is_logistic_regression(classes: int) -> None:
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(300, 4))
    y_N = (x_ND @ random.normal(size=(4, classes)) + 1.5 * random.gumbel(size=(300, classes))).argmax(axis=1)
    got = HMEClassifier(0, ridge=0, newton_steps=30, tol=0, max_iter=5).fit(x_ND, y_N).predict_proba(x_ND)
    want = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12).fit(x_ND, y_N).predict_proba(x_ND)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("solver", ["em", "least_squares", "gradient", "online"])
def test_every_solver_bends_where_the_data_bends(solver: str) -> None:
    x_ND, y_N = _bent(1500)
    passes = {"online": 3, "gradient": 12}.get(solver, 30)
    fitted = HMERegressor(1, solver=solver, max_iter=passes, random_state=1, n_init=3).fit(x_ND, y_N)
    assert LinearRegression().fit(x_ND, y_N).score(x_ND, y_N) < 0.75
    assert fitted.score(x_ND, y_N) > 0.97


def test_weights_count_rows() -> None:
    x_ND, y_N = _bent(120)
    twice = HMERegressor(1, random_state=0, tol=0, max_iter=20)
    weighted = twice.fit(x_ND, y_N, np.full(120, 2.0)).predict(x_ND)
    repeated = twice.fit(np.tile(x_ND, (2, 1)), np.tile(y_N, 2)).predict(x_ND)
    np.testing.assert_allclose(weighted, repeated, rtol=1e-6)


@pytest.mark.parametrize("family", ["gaussian", "poisson", "classes"])
@pytest.mark.parametrize("solver", ["em", "least_squares", "gradient", "online", "partial_fit"])
def test_whole_weights_are_rows_repeated_for_every_solver_and_family(solver: str, family: str) -> None:
    """Rows of one batch, so that their number is the same to the stochastic solvers."""
    random = np.random.default_rng(0)
    x_ND, weight_N = random.normal(size=(60, 2)), random.integers(1, 4, 60)
    y_N = random.poisson(np.exp(1 + np.abs(x_ND[:, 0]))).astype(float)
    if family == "classes":
        y_N = (y_N > 4).astype(float)
    kind = HMEClassifier if family == "classes" else partial(HMERegressor, family=family)
    settings = (
        {} if solver == "partial_fit" else {"solver": solver, "max_iter": 1 if solver == "online" else 8, "tol": 0}
    )
    learn = "partial_fit" if solver == "partial_fit" else "fit"
    weighted, repeated = (kind(1, ridge=3.0, batch_size=1000, random_state=0, **settings) for _ in range(2))
    getattr(weighted, learn)(x_ND, y_N, sample_weight=weight_N)
    getattr(repeated, learn)(np.repeat(x_ND, weight_N, axis=0), np.repeat(y_N, weight_N))
    answer = "predict_proba" if family == "classes" else "predict"
    np.testing.assert_allclose(getattr(weighted, answer)(x_ND), getattr(repeated, answer)(x_ND), rtol=1e-6)


def test_a_predictive_distribution_agrees_with_itself() -> None:
    x_ND, y_N = _bent()
    fitted = HMERegressor(2, random_state=0).fit(x_ND, y_N)
    predicted = fitted.predict_dist(x_ND[:50])
    np.testing.assert_allclose(predicted.mean[:, 0], fitted.predict(x_ND[:50]), rtol=1e-9)
    for level in (0.05, 0.5, 0.95):
        np.testing.assert_allclose(predicted.cdf(predicted.quantile(level)), level, rtol=1e-9)
    assert (predicted.quantile(0.9) > predicted.quantile(0.1)).all()
    assert (predicted.variance > 0).all()
    with pytest.raises(ValueError, match=r"level=1\.5 must be between 0 and 1"):
        predicted.quantile(1.5)


def test_counts_are_predicted_by_their_rate_and_quantiles_are_counts() -> None:
    random = np.random.default_rng(0)
    x_ND = random.uniform(-2, 2, size=(800, 1))
    y_N = random.poisson(np.exp(1 + np.abs(x_ND[:, 0])))
    fitted = HMERegressor(1, family="poisson", random_state=0, n_init=3).fit(x_ND, y_N)
    rate_N = np.exp(1 + np.abs(x_ND[:, 0]))
    assert np.mean(np.abs(fitted.predict(x_ND) / rate_N - 1)) < 0.1
    median_NO = fitted.predict_dist(x_ND[:20]).quantile(0.5)
    np.testing.assert_array_equal(median_NO, np.round(median_NO))


def test_responsibilities_are_probabilities_and_the_text_names_inputs() -> None:
    x_ND, y_N = _bent()
    fitted = HMERegressor(2, random_state=0).fit(x_ND, y_N)
    responsible_NL = fitted.apply(x_ND)
    assert responsible_NL.shape == (400, 4)
    np.testing.assert_allclose(responsible_NL.sum(axis=1), 1)
    text = fitted.export_text(["bend", "slope", "idle"])
    assert text.count("expert ") == 4
    assert "bend" in text.splitlines()[0]


def test_growth_stops_when_it_does_not_pay_and_pruning_undoes_what_does_not() -> None:
    x_ND, y_N = _bent(600)
    grown = HMERegressor(0, max_experts=6, random_state=0).fit(x_ND, y_N)
    assert 2 <= grown.mixture_.tree.num_leaves <= 5
    assert grown.score(x_ND, y_N) > 0.98
    line_N = x_ND @ (1, 2, 3) + 0.1 * np.random.default_rng(0).normal(size=600)
    assert HMERegressor(2, prune=True, random_state=0).fit(x_ND, line_N).mixture_.tree.num_leaves == 1


def test_rows_that_arrive_in_parts_teach_as_much() -> None:
    x_ND, y_N = _bent(3000)
    fitted = HMERegressor(1, random_state=3)
    for part in np.array_split(np.arange(3000), 10):
        fitted.partial_fit(x_ND[part], y_N[part])
    assert fitted.score(x_ND, y_N) > 0.9
    classes = HMEClassifier(1, random_state=0)
    for part in np.array_split(np.tile(np.arange(3000), 3), 30):
        classes.partial_fit(x_ND[part], y_N[part] > 3, classes=[False, True])
    assert classes.score(x_ND, y_N > 3) > 0.85


@pytest.mark.parametrize("seed", range(3))
def test_classes_learned_on_line_come_near_to_the_batch(seed: int) -> None:
    """A line has 0.76 of these classes right at best, a tree of two logistic experts nearly all."""
    x_ND, _ = _bent(1500, seed)
    is_high_N = np.abs(x_ND[:, 0]) > 0.7
    online = HMEClassifier(1, solver="online", max_iter=3, n_init=3, random_state=seed).fit(x_ND, is_high_N)
    batch = HMEClassifier(1, n_init=3, random_state=seed).fit(x_ND, is_high_N)
    assert online.score(x_ND, is_high_N) > batch.score(x_ND, is_high_N) - 0.05


def test_a_fit_of_a_memory_map_copies_no_more_than_a_few_columns_of_it(tmp_path: Path) -> None:
    """60 columns in a file of 48 MB; y, the weights and standardized targets are columns, blocks take 3 MiB."""
    random, path = np.random.default_rng(0), tmp_path / "x.npy"
    x_ND = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(100_000, 60))
    x_ND[:] = random.normal(size=x_ND.shape)
    y_N = np.abs(x_ND[:, 0]) + x_ND[:, 1]
    mapped_ND = np.load(path, mmap_mode="r")
    HMERegressor(1, max_iter=1).fit(x_ND[:2000], y_N[:2000])  # imports
    tracemalloc.start()
    fitted = HMERegressor(1, max_iter=2, random_state=0).fit(mapped_ND, y_N)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * mapped_ND.nbytes
    small = HMERegressor(1, max_iter=2, random_state=0).fit(np.array(mapped_ND), y_N)
    np.testing.assert_array_equal(fitted.predict(x_ND[:50]), small.predict(x_ND[:50]))


def test_rows_after_a_fit_refine_it() -> None:
    x_ND, y_N = _bent(1000)
    fitted = HMERegressor(1, random_state=1, n_init=3).fit(x_ND[:500], y_N[:500])
    before = fitted.score(x_ND, y_N)
    fitted.partial_fit(x_ND[500:520], y_N[500:520])
    assert fitted.score(x_ND, y_N) > before - 0.01
    with pytest.raises(ValueError, match="y has 2 columns; the rows before had 1"):
        fitted.partial_fit(x_ND, np.column_stack([y_N, y_N]))


def test_counts_are_learned_on_line() -> None:
    random = np.random.default_rng(0)
    x_ND = random.uniform(-2, 2, size=(3000, 1))
    rate_N = np.exp(1 + np.abs(x_ND[:, 0]))
    fitted = HMERegressor(1, family="poisson", solver="online", max_iter=3, n_init=3, random_state=0)
    fitted.fit(x_ND, random.poisson(rate_N))
    assert np.mean(np.abs(fitted.predict(x_ND) / rate_N - 1)) < 0.15
