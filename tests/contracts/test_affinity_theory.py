"""The theorems of LocMoE and LocMoE+ hold: by quadrature, sampling and simulation, and by scipy where there is one."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.dispatch import FixedCapacity
from turnout.routers import LocMoEPlus
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


TOKENS = 256


def own_tokens_among_others(trials: int, right: tuple[float, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Trials of TOKENS tokens (T, n), and where expert i's own token stands in each (trials, n): at a random place.

    GrAP's rows of n experts are the axes of n features, so a token's best expert is its largest feature: any for the
    others, expert i for its own with chance p_i.
    """
    num_experts = len(right)
    x_TE = torch.randn(trials * TOKENS, num_experts, generator=generator)
    place_BE = torch.rand(trials, TOKENS, generator=generator).argsort(dim=1)[:, :num_experts]
    own_BE = place_BE + TOKENS * torch.arange(trials).unsqueeze(1)
    for expert, p in enumerate(right):
        own_B = own_BE[:, expert]
        best_B = x_TE[own_B].argmax(dim=1)
        is_right_B = torch.rand(trials, generator=generator) < p
        elsewhere_B = (expert + torch.randint(1, num_experts, (trials,), generator=generator)) % num_experts
        wanted_B = torch.where(is_right_B, expert, elsewhere_B)
        largest_B, instead_B = x_TE[own_B, best_B], x_TE[own_B, wanted_B]
        x_TE[own_B, best_B] = instead_B
        x_TE[own_B, wanted_B] = largest_B
    return x_TE, own_BE


@pytest.mark.parametrize("right", [(0.25, 0.5, 0.75, 1.0), (0.1, 0.1, 0.1, 0.5)])
@pytest.mark.parametrize("capacity", [16, 32])
def test_token_choice_finds_its_token_as_often_as_theorem_five_says(capacity: int, right: tuple[float, ...]) -> None:
    """The router chooses by affinity, and an expert keeps the first C that come, whatever they are."""
    trials, num_experts = 2000, len(right)
    x_TE, own_BE = own_tokens_among_others(trials, right, torch.Generator().manual_seed(0))
    assignment = LocMoEPlus(k=1, mode="token_choice").build(num_experts, num_experts)(x_TE).assignment
    policy = FixedCapacity(factor=capacity * num_experts / TOKENS, group_size=TOKENS)
    keep_N = policy.admit(assignment).keep_N
    assert keep_N is not None
    expert_T, keep_T = assignment.expert_N[own_BE], keep_N[own_BE]  # one choice a token, in the order of tokens
    success = float((keep_T & (expert_T == torch.arange(num_experts))).double().mean())
    want = theory.token_choice_success(capacity, right, TOKENS)
    assert math.isclose(want, capacity * sum(right) / TOKENS)
    # 4 standard deviations, and that an expert's own tokens add to its load
    assert abs(success - want) < 4 * math.sqrt(want / trials / num_experts) + 0.02 * want


def test_more_room_than_tokens_is_no_chance_above_one() -> None:
    assert theory.token_choice_success(TOKENS, (0.25, 0.5, 0.75, 1.0), TOKENS) == 1.0


def expert_choice_success(capacity: int, beaten: float, *, num_tokens: int, trials: int) -> float:
    """How often expert 0 of a router is sent the token that a random one beats there with chance q.

    GrAP's rows are the axes of 3 features, and the cosine of a random token with an axis is even from -1 to 1
    (Archimedes): a token of cosine 1 - 2q is beaten with chance q.
    """
    generator = torch.Generator().manual_seed(0)
    settings = LocMoEPlus(
        k=1, mode="expert_choice", threshold=1.0, floor="none", minimum=0, factor=3 * capacity / num_tokens
    )
    router = settings.build(3, 3)
    cosine = 1 - 2 * beaten
    found = 0
    for _ in range(trials):
        x_TD = torch.randn(num_tokens, 3, generator=generator)
        own = int(torch.randint(0, num_tokens, (1,), generator=generator))
        aside = F.normalize(x_TD[own, 1:], dim=0) * math.sqrt(1 - cosine**2)
        x_TD[own] = torch.cat([torch.tensor([cosine]), aside])
        assignment = router(x_TD).assignment
        assert int(assignment.counts_E[0]) <= capacity
        found += bool(((assignment.token_N == own) & (assignment.expert_N == 0)).any())
    return found / trials


# rows an expert keeps of 200 tokens, a q for which theorem 5 says that it finds its own, and one that it does not
SEARCHES = ((2, 0.005, 0.03), (8, 0.02, 0.1), (16, 0.03, 0.2), (40, 0.1, 0.5))


@pytest.mark.parametrize(("capacity", "seldom", "often"), SEARCHES)
def test_expert_choice_finds_its_token_within_the_bounds_of_theorem_five(
    capacity: int, seldom: float, often: float
) -> None:
    num_tokens, trials = 200, 200
    easy, hard = (expert_choice_success(capacity, q, num_tokens=num_tokens, trials=trials) for q in (seldom, often))
    (least, no_bound), (none, most) = (
        theory.expert_choice_success(capacity, (q,), num_tokens) for q in (seldom, often)
    )
    assert (none, no_bound) == (0.0, 1.0)
    # an expert that keeps any C tokens, its worst or all of them would be outside one of the two
    assert capacity / num_tokens < 0.25 * least
    assert most < 0.5
    assert least <= easy
    assert hard <= most
    lower, upper = theory.expert_choice_success(capacity, (seldom, often), num_tokens)
    assert lower <= (easy + hard) / 2 <= upper
    assert 0 < lower < upper < 1


def test_the_bounds_of_theorem_five_where_its_conditions_hold() -> None:
    assert theory.expert_choice_success(40, (0.1, 0.05), 200) == (1 - math.exp(-7.5), 1.0)
    lower, upper = theory.expert_choice_success(5, (0.5, 0.1), 201)
    assert lower == 0.0
    assert math.isclose(upper, (math.exp(-12.5) + math.exp(-2.5)) / 2)
