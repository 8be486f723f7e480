"""Recursive least squares is weighted least squares, a block at a time; other families learn by the same recursion."""

import numpy as np
import pytest

from tests.hme.problems import random_problem

pytest.importorskip("sklearn")

from turnout.errors import ConfigError
from turnout.hme.algebra import unpack
from turnout.hme.em import EMConfig, fit_em
from turnout.hme.families import Softmax
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import new_mixture
from turnout.hme.online import LEAST_NOISE_ROWS, OnlineConfig, Recursion, forgetting_at, learn_rows
from turnout.hme.rows import Rows
from turnout.hme.sweep import loglik
from turnout.hme.tree import Tree


@pytest.mark.parametrize(("forgetting", "block_rows"), [(1.0, 1), (1.0, 7), (1.0, 500), (0.97, 1)])
def test_recursive_least_squares_equals_batch_weighted_least_squares(forgetting: float, block_rows: int) -> None:
    random = np.random.default_rng(0)
    x_NP, y_NT, weight_N = random.normal(size=(200, 6)), random.normal(size=(200, 2)), random.uniform(0, 1, 200)
    weight_N[::7] = 0
    config = OnlineConfig(
        forgetting=forgetting, forgets="all", settle_share=0.0, block_rows=block_rows, expert_variance=100.0
    )
    rows = Rows(x_NP=x_NP, y_NT=y_NT, weight_N=weight_N)
    start = new_mixture(Tree.complete(0, 2), Gaussian(targets=2), y_NT.T, weight_N, 6, random)
    state = learn_rows(Recursion.start(start, config), rows, config)
    # what was known before any row is a ridge of 1 / variance, and is forgotten like the rows
    left = (x_NP * (forgetting ** np.arange(199, -1, -1.0) * weight_N)[:, None]).T
    information = left @ x_NP + forgetting**200 / 100 * np.eye(6)
    np.testing.assert_allclose(unpack(state.expert_LCQ[0, 0], 6), information, rtol=1e-9, atol=1e-9)
    want_PO = np.linalg.solve(information, left @ y_NT)
    np.testing.assert_allclose(state.mixture.experts.weight_LPO[0], want_PO, rtol=1e-7, atol=1e-9)


def test_rows_learned_on_line_leave_the_noise_of_the_batch() -> None:
    """Errors before times errors after each step sum to what least squares leaves; the first noise counts as rows."""
    random = np.random.default_rng(1)
    x_NP = np.column_stack([random.normal(size=(5000, 3)), np.ones(5000)])
    y_NT = x_NP @ random.normal(size=(4, 1)) + 0.3 * random.normal(size=(5000, 1))
    rows = Rows(x_NP=x_NP, y_NT=y_NT, weight_N=np.ones(5000))
    config = OnlineConfig(forgetting=1.0)
    start = new_mixture(Tree.complete(0, 2), Gaussian(targets=1), y_NT.T, rows.weight_N, 4, random)
    got = learn_rows(Recursion.start(start, config), rows, config).mixture.experts.covariance_LOO[0, 0, 0]
    first_share = LEAST_NOISE_ROWS / (LEAST_NOISE_ROWS + 5000)
    assert got == pytest.approx(0.09 + first_share * y_NT.var(), rel=0.1)


@pytest.mark.parametrize("classes", [2, 4])
def test_one_softmax_expert_learned_on_line_is_nearly_the_likeliest(classes: int) -> None:
    random = np.random.default_rng(classes)
    x_NP = np.column_stack([random.normal(size=(4000, 3)), np.ones(4000)])
    label_N = (2 * x_NP @ random.normal(size=(4, classes)) + random.gumbel(size=(4000, classes))).argmax(axis=1)
    rows = Rows(x_NP=x_NP, y_NT=np.eye(classes)[label_N], weight_N=np.ones(4000))
    start = new_mixture(Tree.complete(0, 2), Softmax(targets=classes), rows.y_NT.T, rows.weight_N, 4, random)
    # curvature measured far from the maximum must be forgotten
    config = OnlineConfig(forgetting=0.99, settle_share=0.6)
    got = loglik(rows, learn_rows(Recursion.start(start, config), rows, config).mixture)
    best = fit_em(start, rows, EMConfig(max_iter=2, tol=0, newton_steps=50)).loglik_path[-1]
    assert best >= got > best - 0.01 * abs(best)


def test_lambda_goes_to_one_by_six_tenths_every_thousand_rows() -> None:
    config = OnlineConfig(settle_share=0.6)
    assert forgetting_at(999, config) == 0.99
    assert forgetting_at(1000, config) == pytest.approx(1 - 0.01 * 0.4)
    assert forgetting_at(3500, config) == pytest.approx(1 - 0.01 * 0.4**3)


@pytest.mark.parametrize("gates", ["newton", "log_posteriors"])
@pytest.mark.parametrize("family", ["gaussian", "softmax", "poisson"])
def test_experts_that_see_nothing_stay_finite_under_constant_forgetting(family: str, gates: str) -> None:
    mixture, rows = random_problem(3, family)
    config = OnlineConfig(forgetting=0.9, settle_share=0.0, forgets="all", gates=gates, block_rows=3)
    state = Recursion.start(mixture, config)
    for _ in range(10):
        state = learn_rows(state, rows, config)
    for array in (state.expert_LCQ, state.gate_GCQ, state.mixture.gate_GPO, state.mixture.experts.weight_LPO):
        assert np.isfinite(array).all()
    assert np.isfinite(loglik(rows, state.mixture))


def test_a_fitted_mixture_is_not_undone_by_the_next_rows() -> None:
    mixture, rows = random_problem(3, "gaussian")
    fitted = fit_em(mixture, rows, EMConfig(max_iter=20)).mixture
    config = OnlineConfig(forgetting=1.0)
    few = rows.taken(np.arange(3))
    kept = learn_rows(Recursion.after(fitted, rows, config), few, config).mixture
    lost = learn_rows(Recursion.start(fitted, config), few, config).mixture
    assert loglik(rows, fitted) - loglik(rows, kept) < 0.1 * (loglik(rows, fitted) - loglik(rows, lost))


@pytest.mark.parametrize("settings", [{"gates": "soft"}, {"forgets": "none"}, {"forgetting": 0.0}, {"block_rows": 0}])
def test_settings_out_of_range_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        OnlineConfig(**settings)
