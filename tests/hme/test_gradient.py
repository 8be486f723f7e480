"""Gradients equal finite differences and autograd, for every family and every error of 1991."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.hme.problems import as_block, random_problem, stirred

pytest.importorskip("sklearn")

from turnout.hme.ascent import gradient
from turnout.hme.gaussian import Gaussian
from turnout.hme.local_errors import ERRORS
from turnout.hme.mixture import Mixture

CASES = [("mixture", family) for family in ("gaussian", "softmax", "poisson")]
CASES += [("cooperation", "gaussian"), ("competition", "gaussian")]


@pytest.mark.parametrize(("error", "family"), CASES)
@pytest.mark.parametrize("seed", range(8))
def test_gradients_equal_finite_differences(error: str, family: str, seed: int) -> None:
    mixture, rows = random_problem(seed, family)
    mixture, block = stirred(mixture, seed), as_block(rows)
    random, step = np.random.default_rng(seed), 1e-6
    found = gradient(mixture, block, error)
    along_G, along_L = random.normal(size=mixture.gate_GPO.shape), random.normal(size=found.weight_LPO.shape)
    along_G = np.where(mixture.tree.open_GB[:, None, :-1], along_G, 0.0)

    def value(amount: float) -> float:
        experts = replace(mixture.experts, weight_LPO=mixture.experts.weight_LPO + amount * along_L)
        moved = replace(mixture, gate_GPO=mixture.gate_GPO + amount * along_G, experts=experts)
        return ERRORS[error](moved, block).value

    want = (value(step) - value(-step)) / (2 * step)
    got = (found.gate_GPO * along_G).sum() + (found.weight_LPO * along_L).sum()
    assert got == pytest.approx(want, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_of_the_noise_equals_finite_differences(seed: int) -> None:
    mixture, rows = random_problem(seed, "gaussian")
    mixture, block = stirred(mixture, seed), as_block(rows)
    along_L = np.random.default_rng(seed).normal(size=mixture.tree.num_leaves)

    def value(amount: float) -> float:
        covariance_LOO = mixture.experts.covariance_LOO * np.exp(2 * amount * along_L)[:, None, None]
        return ERRORS["mixture"](
            replace(mixture, experts=replace(mixture.experts, covariance_LOO=covariance_LOO)), block
        ).value

    want = (value(1e-6) - value(-1e-6)) / 2e-6
    assert gradient(mixture, block).log_noise_L @ along_L == pytest.approx(want, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_the_likelihoods_gradient_equals_autograd(seed: int) -> None:
    mixture, rows = random_problem(seed, "gaussian")
    mixture, block = stirred(mixture, seed), as_block(rows)
    gate = torch.tensor(mixture.gate_GPO, requires_grad=True)
    weight = torch.tensor(mixture.experts.weight_LPO, requires_grad=True)
    _torch_loglik(mixture, gate, weight, rows.x_NP, rows.y_NT, rows.weight_N).backward()
    found = gradient(mixture, block)
    assert weight.grad is not None
    np.testing.assert_allclose(found.weight_LPO, weight.grad.numpy(), rtol=1e-9, atol=1e-9)
    if mixture.tree.num_gates:
        assert gate.grad is not None
        np.testing.assert_allclose(found.gate_GPO, gate.grad.numpy(), rtol=1e-9, atol=1e-9)


def _torch_loglik(
    mixture: Mixture, gate: torch.Tensor, weight: torch.Tensor, x: np.ndarray, y: np.ndarray, w: np.ndarray
) -> torch.Tensor:
    """The density written down the tree, in torch, with no code of the library's."""
    assert isinstance(mixture.family, Gaussian)
    inputs, targets = torch.tensor(x), torch.tensor(y)

    def log_density(node: int) -> torch.Tensor:
        if node < 0:
            normal = torch.distributions.MultivariateNormal(
                inputs @ weight[~node], torch.tensor(mixture.experts.covariance_LOO[~node])
            )
            return normal.log_prob(targets)
        free = inputs @ gate[node]
        log_odds = torch.cat([free, torch.zeros(len(x), 1, dtype=free.dtype)], dim=1)
        is_open = torch.tensor(mixture.tree.open_GB[node])
        shares = log_odds[:, is_open].log_softmax(dim=1)
        children = [int(c) for c, o in zip(mixture.tree.child_GB[node], is_open.tolist(), strict=True) if o]
        return torch.logsumexp(shares + torch.stack([log_density(c) for c in children], dim=1), dim=1)

    return (torch.tensor(w) * log_density(0 if mixture.tree.num_gates else ~0)).sum()
