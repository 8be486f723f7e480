"""Noise that stays as it started for the first iterations: EM still, and a better partition of smooth data."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.hme.problems import random_problem

pytest.importorskip("sklearn")

from turnout.hme import HMERegressor
from turnout.hme.em import EMConfig, fit_em

HELD = 3


@pytest.mark.parametrize("seed", range(40))
def test_held_noise_stays_and_neither_holding_nor_freeing_it_lowers_the_likelihood(seed: int) -> None:
    mixture, rows = random_problem(seed, "gaussian")
    start_LOO = 0.3 * mixture.experts.covariance_LOO
    if mixture.family.noise != "unit":
        mixture = replace(mixture, experts=replace(mixture.experts, covariance_LOO=start_LOO))
    config = EMConfig(max_iter=HELD, tol=0, hold_noise=HELD, newton_steps=1 + 9 * (seed % 2))
    held = fit_em(mixture, rows, config, keep_last=True)
    np.testing.assert_array_equal(held.mixture.experts.covariance_LOO, mixture.experts.covariance_LOO)
    assert (held.mixture.experts.weight_LPO != 0).any()
    fit = fit_em(mixture, rows, replace(config, max_iter=8))
    path = np.array(fit.objective_path)
    assert path[:HELD] == pytest.approx(held.objective_path[:HELD])
    assert (np.diff(path) >= -1e-9 * np.abs(path[1:])).all(), path
    if mixture.family.noise != "unit":
        assert not np.allclose(fit.mixture.experts.covariance_LOO, start_LOO, rtol=1e-3)


def test_noise_is_freed_where_holding_it_gains_nothing_more() -> None:
    """One expert is fitted after one step; its noise is then that of a fit that never held it."""
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(500, 3))
    y_N = x_ND @ (1, 2, 3) + 0.1 * random.normal(size=500)
    free, held = (HMERegressor(0, hold_noise=hold, noise_start=0.3).fit(x_ND, y_N) for hold in (0, 50))
    np.testing.assert_allclose(held.mixture_.experts.covariance_LOO, free.mixture_.experts.covariance_LOO, rtol=1e-9)
    assert held.converged_
    assert held.n_iter_ < 10


def test_noise_is_never_freed_when_it_is_held_for_all_iterations() -> None:
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(300, 2))
    fitted = HMERegressor(2, hold_noise=9, max_iter=9, tol=0, noise_start=0.3, random_state=0)
    fitted.fit(x_ND, np.abs(x_ND[:, 0]) - x_ND[:, 1])
    # 0.3 variances, and the prior's one row of squared residual 1e-4 among 301
    np.testing.assert_allclose(fitted.mixture_.experts.covariance_LOO[:, 0, 0], 0.3 * (300 + 1e-4) / 301, rtol=1e-9)


def test_experts_that_compete_by_squared_error_divide_smooth_data_better() -> None:
    """A wave of five inputs, 32 experts: error on new rows by the mean over starts, the same number of passes."""
    error = {0: [], 20: []}
    for seed in range(4):
        random = np.random.default_rng(seed)
        x_ND = random.uniform(-2, 2, size=(3000, 5))
        y_NO = np.column_stack([np.sin(2 * x_ND[:, 0]) * x_ND[:, 1], np.cos(x_ND[:, 0]) * x_ND[:, 2]])
        for hold, found in error.items():
            fitted = HMERegressor(
                5, hold_noise=hold, noise_start=0.3 if hold else 1.0, max_iter=30, tol=0, random_state=seed
            ).fit(x_ND[:2000], y_NO[:2000])
            found.append(1 - fitted.score(x_ND[2000:], y_NO[2000:]))
    assert np.mean(error[20]) < 0.8 * np.mean(error[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hold_noise": -1}, r"hold_noise=-1 must be a finite number of at least 0"),
        ({"noise_start": 0}, r"noise_start=0 must be a finite number of at least 0\.0001"),
        ({"noise_start": float("nan")}, r"noise_start=nan must be a finite number"),
        ({"noise_start": 0.3, "noise": "unit"}, r"noise='unit' stays 1, not noise_start=0\.3; choose noise scalar"),
        ({"hold_noise": 5, "family": "poisson"}, r"hold_noise=5 need family='gaussian'"),
        ({"hold_noise": 5, "solver": "online"}, r"hold_noise=5 needs solver='em' or 'least_squares', not 'online'"),
        ({"hold_noise": 5, "solver": "gradient"}, r"hold_noise=5 needs solver='em' or 'least_squares'"),
    ],
)
def test_what_cannot_be_held_is_named(settings: dict[str, Any], message: str) -> None:
    x_ND = np.random.default_rng(0).normal(size=(50, 2))
    with pytest.raises(ValueError, match=message):
        HMERegressor(1, **settings).fit(x_ND, np.arange(50))
