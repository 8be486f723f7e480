"""EM never lowers its objective, posteriors are probabilities, and blocks do not matter."""

import numpy as np
import pytest

from tests.hme.problems import as_block, random_problem, stirred

pytest.importorskip("sklearn")

from turnout.hme import sweep as sweeping
from turnout.hme.em import EMConfig, fit_em, ridge_of
from turnout.hme.sweep import Rows, sweep

CHUNKS = 20


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_em_never_lowers_the_log_likelihood_on_1000_random_problems(chunk: int) -> None:
    for seed in range(chunk * 1000 // CHUNKS, (chunk + 1) * 1000 // CHUNKS):
        mixture, rows = random_problem(seed)
        fit = fit_em(mixture, rows, EMConfig(max_iter=8, tol=0, newton_steps=25 if seed % 2 else 1, ridge=1e-3))
        path = np.array(fit.objective_path)
        assert np.isfinite(path).all(), seed
        assert (np.diff(path) >= -1e-9 * np.abs(path[1:])).all(), (seed, path)


@pytest.mark.parametrize("seed", range(60))
def test_posteriors_and_priors_sum_to_one(seed: int) -> None:
    mixture, rows = random_problem(seed)
    mixture, block = stirred(mixture, seed), as_block(rows)
    np.testing.assert_allclose(mixture.posterior(block.x_PN, block.y_TN).leaf_LN.sum(axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(mixture.priors(block.x_PN).sum(axis=0), 1, rtol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_a_posterior_is_prior_times_density_path_by_path(seed: int) -> None:
    """The recursion of the paper, written plainly: a node's likelihood is the sum over its branches."""
    mixture, rows = random_problem(seed)
    mixture, block = stirred(mixture, seed), as_block(rows)
    share_GBN = np.exp(mixture.log_shares(block.x_PN))
    density_LN = np.exp(mixture.family.judge(block.x_PN, block.y_TN, mixture.experts).log_density_LN)

    def likelihood(node: int) -> np.ndarray:
        if node < 0:
            return density_LN[~node]
        children = mixture.tree.child_GB[node]
        return sum(share_GBN[node, b] * likelihood(c) for b, c in enumerate(children) if mixture.tree.open_GB[node, b])

    want_N = np.log(likelihood(0 if mixture.tree.num_gates else ~0))
    np.testing.assert_allclose(mixture.posterior(block.x_PN, block.y_TN).loglik_N, want_N, rtol=1e-10)


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("log_posteriors", [False, True])
def test_sums_do_not_depend_on_the_size_of_blocks(
    seed: int, log_posteriors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, rows = random_problem(seed)
    rows = Rows(x_NP=np.tile(rows.x_NP, (5, 1)), y_NT=np.tile(rows.y_NT, (5, 1)), weight_N=np.tile(rows.weight_N, 5))
    whole = sweep(rows, mixture, log_posteriors=log_posteriors)
    monkeypatch.setattr(sweeping, "BLOCK_BYTES", 1)  # the least block: 64 rows
    parts = sweep(rows, mixture, log_posteriors=log_posteriors)
    np.testing.assert_allclose(parts.loglik, whole.loglik, rtol=1e-11)
    for name in ("value_M", "gradient_MPO", "information_MCQ"):
        for of in ("gates", "experts"):
            one, two = (getattr(s.gates if of == "gates" else s.experts.moments, name) for s in (whole, parts))
            np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(9))
def test_an_exact_m_step_ends_where_the_gradient_is_zero(seed: int) -> None:
    """With posteriors held, no gate can be improved after 25 Newton steps."""
    mixture, rows = random_problem(seed)
    ridge_P = ridge_of(0.1, rows.x_NP.shape[1])
    first = fit_em(mixture, rows, EMConfig(max_iter=1, tol=0, ridge=0.1)).mixture
    second = fit_em(first, rows, EMConfig(max_iter=1, tol=0, newton_steps=25, ridge=0.1))
    at = second.mixture if second.objective_path[1] >= second.objective_path[0] else first
    moments = sweep(rows, first, at)
    np.testing.assert_allclose(moments.gates.with_ridge(at.gate_GPO, ridge_P).gradient_MPO, 0, atol=2e-2)
    if not moments.experts.square_LOO.size:
        gradient = moments.experts.moments.with_ridge(at.experts.weight_LPO, ridge_P).gradient_MPO
        np.testing.assert_allclose(gradient, 0, atol=2e-2)


def test_algorithm_2_returns_the_best_mixture_it_met() -> None:
    for seed in range(0, 60, 3):
        mixture, rows = random_problem(seed, "gaussian")
        fit = fit_em(mixture, rows, EMConfig(algorithm=2, max_iter=15, tol=0))
        reached = sweep(rows, fit.mixture).loglik + fit.mixture.log_prior(ridge_of(1e-3, rows.x_NP.shape[1]))
        assert reached == pytest.approx(max(fit.objective_path), rel=1e-9)
