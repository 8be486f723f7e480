"""The theorems of LocMoE and LocMoE+ hold: by quadrature, sampling and simulation, and by scipy where there is one."""

import math

import pytest
import torch

from turnout.ranking import keep_best
from turnout.routers import affinity_theory as theory
from turnout.routers.grap import grap_affinity


def beta_by_quadrature(delta: float, dim: int) -> float:
    """P(|cos| >= delta): the share of the sphere's measure sin^(d-2) at angles below acos(delta), by Simpson's rule."""

    def integral(end: float, pieces: int = 4000) -> float:
        step = end / pieces
        value = [math.sin(i * step) ** (dim - 2) for i in range(pieces + 1)]
        return step / 3 * (value[0] + value[-1] + 4 * math.fsum(value[1::2]) + 2 * math.fsum(value[2:-1:2]))

    return integral(math.acos(delta)) / integral(math.pi / 2)


DELTAS = (0.001, 0.01, 0.03, 0.1, 0.3, 0.7, 0.99)


@pytest.mark.parametrize("dim", [2, 3, 4, 17, 256])
@pytest.mark.parametrize("delta", DELTAS)
def test_the_tail_probability_is_a_share_of_the_sphere(dim: int, delta: float) -> None:
    assert math.isclose(theory.tail_probability(delta, dim), beta_by_quadrature(delta, dim), rel_tol=1e-7)


@pytest.mark.parametrize("dim", [2, 3, 17, 256, 4096])
def test_the_tail_probability_and_the_capacity_bound_are_by_the_incomplete_beta_function(dim: int) -> None:
    special = pytest.importorskip("scipy.special")
    for delta in DELTAS:
        want = float(special.betainc((dim - 1) / 2, 0.5, 1 - delta**2))
        assert math.isclose(theory.tail_probability(delta, dim), want, rel_tol=1e-9, abs_tol=1e-300)
        if want > 1e-300:
            assert math.isclose(theory.capacity_bound(delta, dim, 16), 1 / (16 * want), rel_tol=1e-9)


def test_the_tail_probability_is_that_of_sampled_tokens_and_about_three_tenths_at_one_over_root_d() -> None:
    x_TD = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(1))
    cosine_T = grap_affinity(x_TD, 1).squeeze(1)
    for delta in (0.05, 0.125, 0.25):
        p = theory.tail_probability(delta, 64)
        share = float((cosine_T.abs() >= delta).double().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 40_000)
    assert all(abs(theory.tail_probability(d**-0.5, d) - 0.317) < 0.01 for d in (64, 512, 4096))


def test_the_tail_probability_at_its_ends() -> None:
    assert [theory.tail_probability(delta, 7) for delta in (-1.0, 0.0, 1.0, 2.0)] == [1.0, 1.0, 0.0, 0.0]
    assert [theory.tail_probability(delta, 1) for delta in (0.5, 1.0, 1.5)] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("delta", [0.005, 0.01, 0.03, 0.06])
def test_the_bounds_of_theorem_one_stand_in_order_and_meet_at_large_width(delta: float) -> None:
    exact, large = (bound(delta, 4096, 16) for bound in (theory.capacity_bound, theory.capacity_bound_large_dim))
    assert math.isclose(exact, large, rel_tol=0.01)
    assert theory.capacity_floor(delta, 4096, 16) < large


def test_the_numbers_of_remark_seven() -> None:
    assert math.isclose(theory.capacity_floor(0.03, 4096, 1), 6.32, rel_tol=1e-3)
    assert theory.capacity_floor(1.0, 4096, 16) == math.inf
    assert theory.capacity_bound(0.9, 40960, 16) == math.inf
    rows = [
        int(theory.min_capacity(torch.tensor(delta), dim=4096, num_experts=16, num_tokens=1000))
        for delta in (-1.0, 0.0, 0.03, 0.05, 0.06, 0.1, 1.0)
    ]
    assert rows == [1, 1, 1, math.ceil(math.exp(4096 * 0.0025 / 1.9975) / 16), 101, 1000, 1000]
    assert int(theory.min_capacity(torch.tensor(0.5), dim=8, num_experts=2, num_tokens=0)) == 0


def test_token_choice_finds_its_token_as_often_as_theorem_five_says() -> None:
    """An expert keeps the first C that come; the token in question comes at a random place."""
    trials, num_tokens, num_experts, capacity, right = 20_000, 256, 4, 8, (0.25, 0.5, 0.75, 1.0)
    generator = torch.Generator().manual_seed(0)
    successes = 0.0
    for p in right:
        is_right = torch.rand(trials, generator=generator) < p
        earlier = torch.randint(0, num_tokens, (trials,), generator=generator)
        before = torch.binomial(earlier.double(), torch.full((trials,), 1 / num_experts).double(), generator=generator)
        successes += float((is_right & (before < capacity)).double().mean()) / num_experts
    want = theory.token_choice_success(capacity, right, num_tokens)
    assert math.isclose(want, 8 * 2.5 / 256)
    assert 0.9 * want < successes < 1.1 * want
    assert theory.token_choice_success(num_tokens, right, num_tokens) == 1.0


@pytest.mark.parametrize("capacity", [2, 8, 16, 40])
@pytest.mark.parametrize("beaten", [(0.01, 0.02), (0.1, 0.1), (0.3, 0.5), (0.01, 0.5)])
def test_expert_choice_finds_its_token_within_the_bounds_of_theorem_five(
    capacity: int, beaten: tuple[float, ...]
) -> None:
    """By the layer's own choice: each trial is an expert, its first token the one that it should keep."""
    trials, num_tokens = 500, 200
    generator = torch.Generator().manual_seed(0)
    success = 0.0
    for q in beaten:
        affinity = torch.rand(trials, num_tokens, generator=generator)
        affinity[:, 0] = 1 - q
        keep_N = keep_best(
            affinity.flatten(),
            affinity.flatten(),
            torch.arange(trials).repeat_interleave(num_tokens),
            num_experts=trials,
            threshold=1.0,
            floor=0,
            capacity=capacity,
        )
        success += float(keep_N.view(trials, num_tokens)[:, 0].double().mean()) / len(beaten)
    lower, upper = theory.expert_choice_success(capacity, beaten, num_tokens)
    slack = 4 * math.sqrt(0.25 / trials / len(beaten))
    assert lower - slack <= success <= upper + slack


def test_the_bounds_of_theorem_five_where_its_conditions_hold() -> None:
    assert theory.expert_choice_success(40, (0.1, 0.05), 200) == (1 - math.exp(-7.5), 1.0)
    lower, upper = theory.expert_choice_success(5, (0.5, 0.1), 201)
    assert lower == 0.0
    assert math.isclose(upper, (math.exp(-12.5) + math.exp(-2.5)) / 2)
