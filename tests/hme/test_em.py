"""EM never lowers its objective, posteriors are probabilities, and blocks do not matter."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp

from tests.hme.problems import as_block, random_problem, stirred

pytest.importorskip("sklearn")

from benchmarks.hme_problem import on_disk, problem
from turnout.hme import sweep as sweeping
from turnout.hme.algebra import solve_symmetric
from turnout.hme.em import EMConfig, fit_em, ridge_of
from turnout.hme.gaussian import Gaussian
from turnout.hme.glim import GAINED, newton_step
from turnout.hme.sweep import Rows, sweep


@pytest.mark.parametrize("chunk", range(4))
def test_em_never_lowers_the_log_likelihood(chunk: int) -> None:
    _climb(range(25 * chunk, 25 * chunk + 25))


@pytest.mark.exhaustive
@pytest.mark.parametrize("chunk", range(10))
def test_em_never_lowers_the_log_likelihood_on_1000_random_problems(chunk: int) -> None:
    _climb(range(100 * chunk, 100 * chunk + 100))


def _climb(seeds: range) -> None:
    """Every kind of tree and family; one damped Newton step an iteration and M-steps to the maximum take turns."""
    for seed in seeds:
        mixture, rows = random_problem(seed)
        exact = (seed // 3) % 2  # families change by threes
        fit = fit_em(mixture, rows, EMConfig(max_iter=4 if exact else 8, tol=0, newton_steps=50 if exact else 1))
        path = np.array(fit.objective_path)
        assert np.isfinite(path).all(), seed
        assert (np.diff(path) >= -1e-9 * np.abs(path[1:])).all(), (seed, path)


@pytest.mark.parametrize("chunk", range(4))
def test_without_priors_exact_m_steps_never_lower_the_log_likelihood_itself(chunk: int) -> None:
    _climb_plainly(range(25 * chunk, 25 * chunk + 25))


@pytest.mark.exhaustive
@pytest.mark.parametrize("chunk", range(10))
def test_without_priors_the_log_likelihood_itself_never_falls_on_1000_random_problems(chunk: int) -> None:
    _climb_plainly(range(100 * chunk, 100 * chunk + 100))


def _climb_plainly(seeds: range) -> None:
    """No ridge, and of the noise prior what keeps an exact fit's noise above zero: a billionth of a row."""
    for seed in seeds:
        mixture, rows = random_problem(seed)
        if isinstance(mixture.family, Gaussian):
            mixture = replace(mixture, family=replace(mixture.family, noise_rows=1e-9))
        fit = fit_em(mixture, rows, EMConfig(max_iter=4, tol=0, ridge=0.0, newton_steps=50))
        path = np.array(fit.loglik_path)
        assert path[-1] > path[0] or mixture.tree.num_leaves == 1, seed
        assert (np.diff(path) >= -1e-9 * np.abs(path[1:])).all(), (seed, path)


@pytest.mark.parametrize("seed", range(60))
def test_posteriors_and_priors_sum_to_one(seed: int) -> None:
    mixture, rows = random_problem(seed)
    mixture, block = stirred(mixture, seed), as_block(rows)
    np.testing.assert_allclose(mixture.posterior(block.z_ZN).leaf_LN.sum(axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(mixture.priors(block.x_PN).sum(axis=0), 1, rtol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_a_posterior_is_prior_times_density_path_by_path(seed: int) -> None:
    """The recursion of the paper, written plainly: a node's likelihood is the sum over its branches."""
    mixture, rows = random_problem(seed)
    mixture, block = stirred(mixture, seed), as_block(rows)
    share_GBN = np.exp(mixture.shares(block.x_PN).log_MBN)
    density_LN = np.exp(mixture.read(block.z_ZN).judged.log_density_LN)

    def likelihood(node: int) -> np.ndarray:
        if node < 0:
            return density_LN[~node]
        children = mixture.tree.child_GB[node]
        return sum(share_GBN[node, b] * likelihood(c) for b, c in enumerate(children) if mixture.tree.open_GB[node, b])

    want_N = np.log(likelihood(0 if mixture.tree.num_gates else ~0))
    np.testing.assert_allclose(mixture.posterior(block.z_ZN).loglik_N, want_N, rtol=1e-10)


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("log_posteriors", [False, True])
def test_sums_do_not_depend_on_the_size_of_blocks(
    seed: int, log_posteriors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, rows = random_problem(seed)
    rows = Rows(x_NP=np.tile(rows.x_NP, (5, 1)), y_NT=np.tile(rows.y_NT, (5, 1)), weight_N=np.tile(rows.weight_N, 5))
    whole = sweep(rows, mixture, log_posteriors=log_posteriors)
    monkeypatch.setattr(sweeping, "BLOCK_BYTES", 1)  # the least block
    parts = sweep(rows, mixture, log_posteriors=log_posteriors)
    np.testing.assert_allclose(parts.loglik, whole.loglik, rtol=1e-11)
    for name in ("gradient_MPO", "information_MCQ"):
        for of in ("gates", "experts"):
            one, two = (getattr(s.gates if of == "gates" else s.experts.moments, name) for s in (whole, parts))
            np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(9))
def test_sums_do_not_depend_on_how_many_inputs_have_their_pairs_formed(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, rows = random_problem(seed)
    paired = sweep(rows, stirred(mixture, seed))
    monkeypatch.setattr(sweeping, "MANY_INPUTS", 0)
    single = sweep(rows, stirred(mixture, seed))
    for one, two in ((paired.gates, single.gates), (paired.experts.moments, single.experts.moments)):
        np.testing.assert_allclose(two.information_MCQ, one.information_MCQ, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(two.gradient_MPO, one.gradient_MPO, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [3, 12])
def test_large_systems_are_solved_one_by_one_alike(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regular or singular: of those the solution of least length."""
    random = np.random.default_rng(rank)
    root_MPR = random.normal(size=(4, 12, rank))
    a_MPP = root_MPR @ root_MPR.swapaxes(1, 2)
    b_MPO = a_MPP @ random.normal(size=(4, 12, 2))
    batch_MPO = solve_symmetric(a_MPP, b_MPO)
    monkeypatch.setattr("turnout.hme.algebra.LARGE_SYSTEM", 1)
    np.testing.assert_allclose(solve_symmetric(a_MPP, b_MPO), batch_MPO, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(a_MPP @ batch_MPO, b_MPO, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(18))
def test_an_exact_m_step_leaves_nothing_to_gain(seed: int) -> None:
    """With posteriors held, no gate and no expert can be improved: the gradient is zero, and so is what is promised."""
    mixture, rows = random_problem(seed)
    ridge_P = ridge_of(0.1, rows.x_NP.shape[1])
    first = fit_em(mixture, rows, EMConfig(max_iter=1, tol=0, ridge=0.1)).mixture
    second = fit_em(first, rows, EMConfig(max_iter=1, tol=0, newton_steps=50, ridge=0.1), keep_last=True).mixture
    sums = sweep(rows, first, second)
    for moments, weight_MPO in (
        (sums.gates, second.gate_GPO),
        (sums.experts.moments, second.experts.weight_LPO),
    ):
        held = moments.with_ridge(weight_MPO, ridge_P)
        gain_M = 0.5 * (held.gradient_MPO * newton_step(held, ridge_P)).sum(axis=(1, 2))
        assert (gain_M <= GAINED * rows.weight_N.sum()).all()
        np.testing.assert_allclose(held.gradient_MPO, 0, atol=1e-4)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Rows lie in files; a fit holds blocks and sums, whose size 50,000 rows fill."""
    peaks = []
    for num_rows in (50_000, 100_000):
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        mixture, rows = on_disk(folder, num_rows, 10, 2)
        tracemalloc.start()
        fit_em(mixture, rows, EMConfig(max_iter=1, tol=0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_blocks_are_held_up_to_a_bound_and_give_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, rows = problem(3000, 4, 2, 2)
    held = rows.held_for(mixture)
    held_bytes = sum(b.x_PN.nbytes + b.y_TN.nbytes + b.product_QN.nbytes for b in held.held)
    assert len(held.held) > 0
    with_them = fit_em(mixture, rows, EMConfig(max_iter=5, tol=0))
    monkeypatch.setattr("turnout.hme.sweep.MOST_HELD_BYTES", held_bytes)
    assert rows.held_for(mixture).held
    monkeypatch.setattr("turnout.hme.sweep.MOST_HELD_BYTES", held_bytes - 1)
    assert not rows.held_for(mixture).held
    assert fit_em(mixture, rows, EMConfig(max_iter=5, tol=0)).loglik_path == with_them.loglik_path


def test_no_posterior_is_subnormal_and_the_rest_are_exact() -> None:
    """Experts of nearly no noise: all leaves but one are farther than e^-745 away."""
    mixture, rows = problem(500, 3, 2, 1)
    mixture = fit_em(mixture, rows, EMConfig(max_iter=3, tol=0)).mixture
    tiny = replace(mixture, experts=replace(mixture.experts, covariance_LOO=1e-6 * mixture.experts.covariance_LOO))
    block = rows.block(slice(None))
    posterior = tiny.posterior(block.z_ZN)
    log_joint_LN = tiny.log_priors(posterior.reading.shares) + posterior.reading.judged.log_density_LN
    want_LN = np.exp(log_joint_LN - logsumexp(log_joint_LN, axis=0))
    assert ((want_LN > 0) & (want_LN < np.finfo(float).tiny)).any() or (want_LN == 0).any()
    assert (posterior.leaf_LN >= np.finfo(float).tiny).all()
    np.testing.assert_allclose(posterior.leaf_LN, want_LN, rtol=1e-9, atol=1e-100)


def test_algorithm_2_returns_the_best_mixture_it_met() -> None:
    for seed in range(0, 60, 3):
        mixture, rows = random_problem(seed, "gaussian")
        fit = fit_em(mixture, rows, EMConfig(algorithm=2, max_iter=15, tol=0))
        reached = sweep(rows, fit.mixture).loglik + fit.mixture.log_prior(ridge_of(1e-3, rows.x_NP.shape[1]))
        assert reached == pytest.approx(max(fit.objective_path), rel=1e-9)
