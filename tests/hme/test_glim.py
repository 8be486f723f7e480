"""A damped Newton step never lowers what it climbs, however far the rows lie and however wrong the weights are."""

from functools import partial

import numpy as np
import pytest
from scipy.special import log_softmax

from turnout.hme.algebra import pair_products, stacked
from turnout.hme.families import Experts, Poisson
from turnout.hme.glim import Moments, climbed, moments, newton_step, safe_share, spread
from turnout.hme.shares import predictors, softmax_slopes, softmax_with_last_zero
from turnout.hme.tree import Floats

NO_RIDGE = 1e-9


def _far_problem(seed: int) -> tuple[Floats, Floats, Floats]:
    """Rows of very different size, masses of branches that cannot all be fitted, weights far from the maximum."""
    random = np.random.default_rng(seed)
    size, outputs, num_rows = random.integers(1, 5), random.integers(1, 4), random.integers(6, 30)
    x_PN = random.standard_t(2, (size, num_rows)) * 10 ** random.uniform(-1, 1.5)
    mass_1BN = random.gamma(0.3, size=(1, outputs + 1, num_rows))
    return x_PN, mass_1BN, random.normal(size=(1, size, outputs)) * 10 ** random.uniform(-1, 1)


def _softmax(x_PN: Floats, mass_1BN: Floats, weight_1PO: Floats) -> tuple[float, Moments]:
    predictor_ON = predictors(x_PN, weight_1PO)[0]
    log_share_BN = log_softmax(np.vstack([predictor_ON, np.zeros(x_PN.shape[1])]), axis=0)
    shares = softmax_with_last_zero(predictors(x_PN, weight_1PO))
    value = float((mass_1BN[0] * log_share_BN).sum()) - 0.5 * NO_RIDGE * float((weight_1PO**2).sum())
    slopes = softmax_slopes(shares.free_MON, mass_1BN[:, :-1], mass_1BN.sum(axis=1, keepdims=True))
    return value, moments(x_PN, pair_products(x_PN), slopes)[0]


def _move(x_PN: Floats, step_MPO: Floats) -> Floats:
    return spread(predictors(x_PN, step_MPO))


def test_a_damped_step_never_lowers_a_softmax_and_a_whole_one_does() -> None:
    falls = 0
    for seed in range(300):
        x_PN, mass_1BN, weight_1PO = _far_problem(seed)
        ridge_P = np.full(len(x_PN), NO_RIDGE)
        value, found = _softmax(x_PN, mass_1BN, weight_1PO)
        after_1PO, promise = climbed(weight_1PO, found, ridge_P, partial(_move, x_PN), 0.0)
        after, _ = _softmax(x_PN, mass_1BN, after_1PO)
        assert after >= value - 1e-9 * (1 + abs(value)), seed
        assert after > value or promise < 1e-6, seed
        whole_1PO = weight_1PO + newton_step(found.with_ridge(weight_1PO, ridge_P), ridge_P)
        falls += _softmax(x_PN, mass_1BN, whole_1PO)[0] < value
    assert falls > 30


def test_a_damped_step_never_lowers_a_poisson_likelihood() -> None:
    for seed in range(100):
        random = np.random.default_rng(seed)
        x_PN = np.vstack([random.normal(size=(2, 20)), np.ones(20)])
        y_1N, weight_LN = random.poisson(3.0, (1, 20)).astype(float), random.uniform(0, 1, (1, 20))
        experts = Experts(weight_LPO=random.normal(size=(1, 3, 1)) * 2, covariance_LOO=np.zeros((1, 0, 0)))
        judged = Poisson().judge(predictors(x_PN, experts.weight_LPO), y_1N, experts)
        slopes = Poisson().slopes(y_1N, weight_LN, judged, np.empty((1, 1, 20)))
        (found,) = moments(x_PN, pair_products(x_PN), slopes)
        after_LPO, _ = climbed(experts.weight_LPO, found, np.zeros(3), partial(_move, x_PN), 0.0)
        after = Poisson().judge(predictors(x_PN, after_LPO), y_1N, experts)
        assert (weight_LN * (after.log_density_LN - judged.log_density_LN)).sum() >= -1e-9, seed


@pytest.mark.parametrize("move", [0.0, 0.5, 1.5, 1.6, 3.0, 30.0, 1e6])
def test_a_share_gains_by_the_bound_it_is_made_from(move: float) -> None:
    share = float(safe_share(np.array([move]))[0])
    bound = share - share**2 / 2 if move == 0 else share - (np.exp(share * move) - share * move - 1) / move**2
    assert 0 < share <= 1
    assert bound > 0


@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_shares_are_the_softmax_with_a_zero_and_know_closed_branches(outputs: int) -> None:
    predictor_MON = np.random.default_rng(0).normal(size=(3, outputs, 50)) * np.array([1.0, 30.0, 800.0])[:, None, None]
    predictor_MON[0, 0] = -np.inf
    shares = softmax_with_last_zero(predictor_MON)
    want_MBN = log_softmax(np.concatenate([predictor_MON, np.zeros((3, 1, 50))], axis=1), axis=1)
    # to the rounding of a predictor of a thousand
    np.testing.assert_allclose(shares.log_MBN, want_MBN, rtol=1e-12, atol=3e-13)
    np.testing.assert_allclose(shares.free_MON, np.exp(want_MBN[:, :-1]), rtol=1e-11, atol=1e-300)


def test_parts_of_one_array_are_stacked_without_a_copy_and_others_with_one() -> None:
    whole = np.arange(28.0).reshape(7, 4)
    parts = [whole[:3, None], whole[3:].reshape(2, 2, 4)]
    assert np.shares_memory(stacked(parts), whole)
    np.testing.assert_array_equal(stacked(parts), whole)
    neighbours = [parts[0], parts[1][:1]]
    assert np.shares_memory(stacked(neighbours), whole)
    np.testing.assert_array_equal(stacked(neighbours), whole[:5])
    for other in ([parts[1], parts[0]], [parts[0], parts[1].copy()], [whole[:2], whole[4:]]):
        got = stacked(other)
        assert not np.shares_memory(got, whole)
        np.testing.assert_array_equal(got, np.concatenate([part.reshape(-1, 4) for part in other]))
