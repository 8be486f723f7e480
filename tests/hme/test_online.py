"""Recursive least squares is weighted least squares, one row at a time."""

import numpy as np
import pytest

from tests.hme.problems import random_problem

pytest.importorskip("sklearn")

from turnout.errors import ConfigError
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import new_mixture
from turnout.hme.online import OnlineConfig, Recursion, forgetting_at, learn_rows, weighted_update
from turnout.hme.sweep import Rows
from turnout.hme.tree import Tree


@pytest.mark.parametrize("forgetting", [1.0, 0.97])
def test_recursive_least_squares_equals_batch_weighted_least_squares(forgetting: float) -> None:
    random = np.random.default_rng(0)
    x_NP, y_NO, weight_NM = random.normal(size=(200, 6)), random.normal(size=(200, 2)), random.uniform(0, 1, (200, 3))
    weight_NM[::7] = 0
    # without forgetting the start counts as nothing; with it, its age is known and is part of the batch problem
    start = 1e-8 if forgetting == 1 else 1e-2
    inverse_MPP, theta_MPO = np.tile(np.eye(6) / start, (3, 1, 1)), np.zeros((3, 6, 2))
    for x_P, y_O, weight_M in zip(x_NP, y_NO, weight_NM, strict=True):
        gain_MP, inverse_MPP = weighted_update(inverse_MPP, x_P, weight_M, forgetting)
        theta_MPO = theta_MPO + gain_MP[:, :, None] * (y_O - x_P @ theta_MPO)[:, None, :]
    age_N = forgetting ** np.arange(199, -1, -1.0)
    for m in range(3):
        left = (x_NP * (age_N * weight_NM[:, m])[:, None]).T
        information = left @ x_NP + (0 if forgetting == 1 else start * forgetting**200) * np.eye(6)
        want_PO = np.linalg.solve(information, left @ y_NO)
        np.testing.assert_allclose(theta_MPO[m], want_PO, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(inverse_MPP[m], np.linalg.inv(information), rtol=1e-5, atol=1e-6)


def test_one_expert_learned_on_line_without_forgetting_is_ridge_regression() -> None:
    random = np.random.default_rng(1)
    x_NP = np.column_stack([random.normal(size=(300, 4)), np.ones(300)])
    rows = Rows(x_NP=x_NP, y_NT=random.normal(size=(300, 2)) + x_NP[:, :2], weight_N=random.uniform(0.5, 2, 300))
    start = new_mixture(Tree.complete(0, 2), Gaussian(targets=2), rows.y_NT.T, rows.weight_N, 5, random)
    config = OnlineConfig(forgetting=1.0, expert_variance=10.0)
    got = learn_rows(Recursion.start(start, config), rows, config).mixture.experts.weight_LPO[0]
    left = (x_NP * rows.weight_N[:, None]).T
    np.testing.assert_allclose(got, np.linalg.solve(left @ x_NP + np.eye(5) / 10, left @ rows.y_NT), rtol=1e-9)


def test_lambda_goes_to_one_by_six_tenths_every_thousand_rows() -> None:
    config = OnlineConfig()
    assert forgetting_at(999, config) == 0.99
    assert forgetting_at(1000, config) == pytest.approx(1 - 0.01 * 0.4)
    assert forgetting_at(3500, config) == pytest.approx(1 - 0.01 * 0.4**3)


def test_experts_that_see_nothing_stay_finite_under_constant_forgetting() -> None:
    mixture, rows = random_problem(3, "gaussian")
    config = OnlineConfig(forgetting=0.9, settle_share=0.0, forgets="all")
    state = Recursion.start(mixture, config)
    for _ in range(30):
        state = learn_rows(state, rows, config)
    assert np.isfinite(state.expert_LPP).all()
    assert np.isfinite(state.mixture.experts.weight_LPO).all()
    assert np.trace(state.expert_LPP, axis1=1, axis2=2).max() <= config.most_variance * rows.x_NP.shape[1] * 1.001


def test_experts_without_least_squares_are_refused() -> None:
    mixture, _ = random_problem(1, "softmax")
    with pytest.raises(ConfigError, match=r"needs Gaussian experts; use solver='gradient'"):
        Recursion.start(mixture, OnlineConfig())
