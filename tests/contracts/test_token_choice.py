"""Token-choice routers beside the plain ones: the law that defines each, by loops or closed formulas."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.contracts.cases import error
from turnout import reference
from turnout.contracts import Router, RouterConfig
from turnout.routers import Cosine, DeviceLimited, GShardTop2, NoisyTopK, TopK, TopP
from turnout.routers.gshard import best_and_sampled
from turnout.routers.noisy_topk import LEAST_STD
from turnout.routers.pieces import gumbel
from turnout.routers.top_p import smallest_prefix
from turnout.tensors import RouterOutput

DRAWS = 20_000


def built(config: RouterConfig, dim: int, num_experts: int, seed: int = 0) -> Router:
    """In float64, with weights of deviation 1 that `seed` draws."""
    router = config.build(dim, num_experts).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert isinstance(router, Router)
    return router


def tokens(num_tokens: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(router: Router, x_TD: Tensor, seed: int = 0) -> RouterOutput:
    return router(x_TD, None, None, torch.Generator().manual_seed(seed))


def phi(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


# any number of choices for one call


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("row", ["softmax", "sigmoid", "cosine"])
def test_a_call_for_k_choices_is_the_router_built_with_k(
    row: Literal["softmax", "sigmoid", "cosine"], renormalize: bool
) -> None:
    def config(k: int) -> RouterConfig:
        if row == "cosine":
            return Cosine(k=k, renormalize=renormalize, proj_dim=3)
        return TopK(k=k, activation=row, renormalize=renormalize, scale=2.5)

    num_experts, x_TD = 11, tokens(17, 4)
    asked = built(config(2), 4, num_experts)
    for k in range(1 + renormalize, num_experts + 1):
        want = built(config(k), 4, num_experts)(x_TD).assignment
        got = asked(x_TD, top_k=k).assignment
        assert got.top_k == k
        assert torch.equal(got.expert_N, want.expert_N)
        assert torch.equal(got.weight_N, want.weight_N)


def test_one_renormalised_choice_has_the_weight_scale() -> None:
    x_TD = tokens(9, 4)
    for activation in ("softmax", "sigmoid"):
        router = built(TopK(activation=activation, scale=2.5), 4, 6)
        assert router(x_TD, top_k=1).assignment.weight_N.tolist() == [2.5] * 9


# noise of Tutel


def test_gate_noise_is_there_in_training_alone_and_has_its_deviation() -> None:
    noisy, plain = built(TopK(gate_noise=2.0), 4, 8), built(TopK(), 4, 8)
    x_TD = tokens(DRAWS // 8, 4)
    clean_RE = plain(x_TD).logits_RE.detach()
    evaluated = seeded(noisy.eval(), x_TD)
    assert torch.equal(evaluated.logits_RE, clean_RE)
    assert evaluated.smooth_load_E is not None
    assert torch.equal(evaluated.smooth_load_E, evaluated.assignment.counts_E.double())
    assert plain(x_TD).smooth_load_E is None
    noise_RE = seeded(noisy.train(), x_TD).logits_RE.detach() - clean_RE
    assert abs(float(noise_RE.std()) - 2.0 / 8) < 4 * 0.25 / math.sqrt(2 * DRAWS)
    assert abs(float(noise_RE.mean())) < 4 * 0.25 / math.sqrt(DRAWS)


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_the_smooth_load_of_gate_noise_is_the_chance_to_pass_the_kth_score(top_k: int) -> None:
    router, plain = built(TopK(gate_noise=1.5), 4, 5).train(), built(TopK(), 4, 5)
    x_TD = tokens(7, 4)
    routing = router(x_TD, None, None, torch.Generator().manual_seed(1), top_k=top_k)
    load_E = [0.0] * 5
    for clean_E, noisy_E in zip(plain(x_TD).logits_RE.tolist(), routing.logits_RE.tolist(), strict=True):
        kth = sorted(noisy_E, reverse=True)[top_k - 1]
        for e in range(5):
            load_E[e] += phi((clean_E[e] - kth) / (1.5 / 5))
    assert routing.smooth_load_E is not None
    assert error(routing.smooth_load_E, torch.tensor(load_E, dtype=torch.float64)) < 1e-14
    assert torch.equal(routing.assignment.as_topk()[0], reference.best_experts(routing.logits_RE, top_k))


# second expert of GShard


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", ["none", "threshold"])
def test_a_second_expert_is_sent_by_its_weight_alone(policy: Literal["none", "threshold"], training: bool) -> None:
    router = built(GShardTop2(second_expert=policy, threshold=0.3), 4, 6).train(training)
    assignment = seeded(router, tokens(200, 4)).assignment
    assert assignment.declined_N is not None
    declined_R2, weight_R2 = assignment.declined_N.view(-1, 2), assignment.as_topk()[1]
    for (first, second), (_, weight) in zip(declined_R2.tolist(), weight_R2.tolist(), strict=True):
        assert not first
        assert second == (policy == "none" or weight <= 0.3)
    assert 0 < int(declined_R2[:, 1].sum()) <= 200
    assert bool(declined_R2[:, 1].all()) == (policy == "none")


def test_a_sampled_second_expert_follows_the_softmax_without_the_first() -> None:
    router = built(GShardTop2(second_expert="sampled"), 1, 6).train()
    routing = seeded(router, torch.ones(DRAWS, 1, dtype=torch.float64))
    expert_R2, weight_R2 = routing.assignment.as_topk()
    assert routing.assignment.declined_N is None
    logit = routing.logits_RE[0].tolist()
    first = logit.index(max(logit))
    assert (expert_R2[:, 0] == first).all()
    share = [0.0 if e == first else math.exp(logit[e]) for e in range(6)]
    expected = [DRAWS * s / sum(share) for s in share]
    found = torch.bincount(expert_R2[:, 1], minlength=6).tolist()
    assert found[first] == 0
    # chi-square of 4 degrees of freedom: 1 in 100,000 is above 28.5
    assert sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True) if e) < 28.5
    pair_R2 = routing.logits_RE.gather(1, expert_R2).exp()
    assert error(weight_R2, pair_R2 / pair_R2.sum(dim=1, keepdim=True)) < 1e-14


def test_a_sampled_second_expert_is_the_second_best_in_evaluation() -> None:
    sampled, both = (built(GShardTop2(second_expert=p), 4, 6).eval() for p in ("sampled", "all"))
    x_TD = tokens(50, 4)
    assert torch.equal(seeded(sampled, x_TD).assignment.expert_N, both(x_TD).assignment.expert_N)


def test_no_draw_makes_the_second_expert_the_first() -> None:
    edges = torch.tensor([0.0, 2**-24, 1 - 2**-24])
    assert (gumbel(edges) > -torch.inf).all()
    for draw in edges:
        assert best_and_sampled(torch.zeros(1, 2), draw.expand(1, 2)).tolist() == [[0, 1]]


# noisy top-k


def noisy_case(k: int, num_experts: int, x_TD: Tensor) -> tuple[RouterOutput, Tensor, Tensor]:
    """A routing with noise, and the scores and deviations behind it by their formulas."""
    router = built(NoisyTopK(k=k), x_TD.shape[1], num_experts).train()
    clean_RE = x_TD @ router.get_parameter("score.weight_ED").T
    std_RE = torch.log1p(torch.exp(x_TD @ router.get_parameter("noise.weight_ED").T)) + LEAST_STD
    return seeded(router, x_TD), clean_RE.detach(), std_RE.detach()


def test_noisy_weights_are_the_softmax_of_the_kept_noisy_scores() -> None:
    x_TD = tokens(40, 4)
    routing, clean_RE, std_RE = noisy_case(3, 6, x_TD)
    draw_RE = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    assert error(routing.logits_RE, clean_RE + draw_RE * std_RE) < 1e-14
    expert_RK, weight_RK = routing.assignment.as_topk()
    assert torch.equal(expert_RK, reference.best_experts(routing.logits_RE, 3))
    want_RE = reference.topk_gates(routing.logits_RE, expert_RK)
    assert error(weight_RK, want_RE.gather(1, expert_RK)) < 1e-14


def test_noise_is_there_in_training_alone_and_always_has_a_gradient() -> None:
    router = built(NoisyTopK(k=2), 4, 6).eval()
    x_TD = tokens(20, 4)
    routing = router(x_TD)
    assert error(routing.logits_RE, x_TD @ router.get_parameter("score.weight_ED").T) < 1e-15
    assert routing.smooth_load_E is not None
    assert torch.equal(routing.smooth_load_E, routing.assignment.counts_E.double())
    routing.assignment.weight_N.square().sum().backward()
    grad = router.get_parameter("noise.weight_ED").grad
    assert grad is not None
    assert not grad.any()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_smooth_load_is_how_often_an_expert_is_chosen_when_its_own_noise_is_redrawn(k: int) -> None:
    num_experts, x_TD = 5, tokens(3, 4)
    routing, clean_RE, std_RE = noisy_case(k, num_experts, x_TD)
    assert routing.smooth_load_E is not None
    generator = torch.Generator().manual_seed(2)
    for e in range(num_experts):
        noise = torch.randn(DRAWS, 3, generator=generator, dtype=torch.float64)
        noisy = routing.logits_RE.detach().repeat(DRAWS, 1, 1)
        noisy[:, :, e] = clean_RE[:, e] + noise * std_RE[:, e]
        rivals_ahead = (noisy > noisy[:, :, e : e + 1]).sum(dim=2)
        load = float((rivals_ahead < k).double().mean(dim=0).sum())
        assert abs(load - float(routing.smooth_load_E[e].detach())) < 4 * math.sqrt(3 * 0.25 / DRAWS)


def test_the_smooth_load_equals_the_load_on_average_over_the_noise() -> None:
    routing, _, _ = noisy_case(2, 5, tokens(1, 4).expand(DRAWS, 4))
    assert routing.smooth_load_E is not None
    assert abs(float(routing.smooth_load_E.sum().detach()) / DRAWS - 2) < 0.05
    share_E = routing.assignment.counts_E.double() / DRAWS
    assert error(routing.smooth_load_E / DRAWS, share_E) < 5 * (0.25 / DRAWS) ** 0.5


def test_the_smooth_load_moves_score_and_noise_and_is_certain_when_all_are_chosen() -> None:
    router = built(NoisyTopK(k=2), 4, 5).train()
    load_E = seeded(router, tokens(30, 4)).smooth_load_E
    assert load_E is not None
    load_E.var().backward()
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())
    all_E = seeded(built(NoisyTopK(k=5), 4, 5).train(), tokens(30, 4)).smooth_load_E
    assert all_E is not None
    assert all_E.tolist() == [30.0] * 5


def test_matrices_of_zero_tie_in_evaluation_and_spread_evenly_in_training() -> None:
    router = NoisyTopK(k=2).build(4, 5)
    assert not any(p.any() for p in router.parameters())
    x_TD = torch.randn(DRAWS, 4, generator=torch.Generator().manual_seed(0))
    assert router.eval()(x_TD).assignment.counts_E.tolist() == [DRAWS, DRAWS, 0, 0, 0]
    routing = seeded(router.train(), x_TD)
    counts_E = routing.assignment.counts_E.double()
    assert float((counts_E / DRAWS - 2 / 5).abs().max()) < 4 * (0.24 / DRAWS) ** 0.5
    routing.assignment.weight_N.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in router.parameters())


# cosine


def test_cosine_logits_are_cosines_over_the_temperature() -> None:
    router = built(Cosine(proj_dim=3, temperature=0.2), 4, 5)
    router.get_parameter("log_scale").data.fill_(-math.log(0.2))
    x_TD = tokens(8, 4)
    weight, bias = (router.get_parameter(f"projection.{name}") for name in ("weight_ED", "bias_E"))
    logits_RE = router(x_TD).logits_RE
    for t, token in enumerate((x_TD @ weight.T + bias).tolist()):
        for e, expert in enumerate(router.get_parameter("directions").tolist()):
            dot = math.fsum(a * b for a, b in zip(token, expert, strict=True))
            cosine = dot / (math.hypot(*token) * math.hypot(*expert))
            assert abs(float(logits_RE[t, e].detach()) - cosine / 0.2) < 1e-13


def test_the_temperature_starts_as_set_and_never_falls_below_its_floor() -> None:
    router = Cosine(temperature=0.5).build(4, 5)
    log_scale = router.get_parameter("log_scale")
    assert abs(float(log_scale.exp().detach()) - 2) < 1e-6
    log_scale.data.fill_(50.0)
    # at the floor of 0.01 a cosine of 1 is a logit of 100
    router.get_parameter("directions").data.copy_(torch.eye(256)[:5])
    router.get_parameter("projection.bias_E").data.copy_(torch.eye(256)[2])
    assert torch.allclose(router(torch.zeros(1, 4)).logits_RE, torch.tensor([[0.0, 0.0, 100.0, 0.0, 0.0]]))


def test_cosine_does_not_see_the_length_of_a_token() -> None:
    router = Cosine(proj_dim=8).build(4, 5).double()
    x_TD = tokens(8, 4)
    assert error(router(1000 * x_TD).logits_RE, router(x_TD).logits_RE) < 1e-13


def test_a_zero_token_has_a_bounded_gradient_in_a_new_cosine_router() -> None:
    router = Cosine(k=1, renormalize=False).build(4, 5)
    x_TD = torch.zeros(2, 4, requires_grad=True)
    router(x_TD).assignment.weight_N.sum().backward()
    for leaf in (x_TD, *router.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e4


# top-p


def prefix_by_loop(score_E: list[float], p: float) -> list[int]:
    """The paper's sentence: experts from the best down, until their scores sum to p."""
    order = sorted(range(len(score_E)), key=lambda e: (-score_E[e], e))
    chosen: list[int] = []
    while order and math.fsum(score_E[e] for e in chosen) < p:
        chosen.append(order.pop(0))
    return chosen


@pytest.mark.parametrize("p", [0.05, 0.4, 0.7, 0.999])
@pytest.mark.parametrize("num_experts", [1, 2, 7, 20])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_top_p_takes_the_shortest_start_that_sums_to_p(p: float, num_experts: int, most: int) -> None:
    config = TopP(p=p, most=min(most, num_experts), expected_choices=1)
    x_TD = tokens(60, 4)
    routing = built(config, 4, num_experts)(x_TD)
    assignment = routing.assignment
    want = []
    for t, score_E in enumerate(routing.scores_RE.tolist()):
        experts = prefix_by_loop(score_E, p)[: config.most or None]
        assert experts
        want += [(t, e, choice, score_E[e]) for choice, e in enumerate(experts)]
    columns = (assignment.token_N, assignment.expert_N, assignment.choice_N, assignment.weight_N)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == want
    assert assignment.top_k is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_that_sum_to_exactly_p_do_not_need_one_more(dtype: torch.dtype) -> None:
    for num_experts in range(2, 65):
        score_1E = torch.zeros(1, num_experts, dtype=dtype).softmax(dim=1)
        for number in range(1, num_experts + 1):
            assert int(smallest_prefix(score_1E, number / num_experts).sum()) == number


def test_a_probability_of_one_takes_every_expert_that_has_any() -> None:
    router = built(TopP(p=1.0), 1, 4)
    router.get_parameter("score.weight_ED").data.copy_(torch.tensor([[3.0], [1.0], [2.0], [-9e3]]))
    assert router(torch.ones(1, 1, dtype=torch.float64)).assignment.expert_N.tolist() == [0, 2, 1]


def test_padding_keeps_its_place_beside_tokens_of_many_lengths() -> None:
    router = built(TopP(p=0.9), 4, 6)
    x_TD, mask_T = tokens(20, 4), torch.arange(20) % 3 != 0
    whole, part = router(x_TD).assignment, router(x_TD, None, mask_T).assignment
    kept_N = mask_T[whole.token_N]
    assert torch.equal(part.token_N, whole.token_N[kept_N])
    assert torch.equal(part.expert_N, whole.expert_N[kept_N])


# devices of DeepSeek-V2


@pytest.mark.parametrize(("k", "groups", "top_groups"), [(1, 4, 1), (3, 4, 1), (6, 4, 3), (5, 2, 2), (4, 12, 4)])
def test_device_limited_takes_the_best_experts_of_the_best_devices(k: int, groups: int, top_groups: int) -> None:
    num_experts, size = 12, 12 // groups
    router = built(DeviceLimited(k=k, groups=groups, top_groups=top_groups, scale=16.0), 5, num_experts)
    x_TD = tokens(80, 5)
    # ties between experts and between devices
    x_TD[::4] = 0
    routing = router(x_TD)
    expert_RK, weight_RK = routing.assignment.as_topk()
    assert all(len(set(row)) <= top_groups for row in (expert_RK // size).tolist())
    for score_E, experts, weights in zip(
        routing.scores_RE.tolist(), expert_RK.tolist(), weight_RK.tolist(), strict=True
    ):
        best = [max(score_E[g * size : (g + 1) * size]) for g in range(groups)]
        reached = sorted(range(groups), key=lambda g: (-best[g], g))[:top_groups]
        near = [e for e in range(num_experts) if e // size in reached]
        want = sorted(near, key=lambda e: (-score_E[e], e))[:k]
        assert experts == want
        assert weights == [16.0 * score_E[e] for e in want]


def test_device_limited_without_a_limit_is_plain_top_k() -> None:
    limited, plain = built(DeviceLimited(k=3), 4, 8), built(TopK(k=3, renormalize=False), 4, 8)
    x_TD = tokens(30, 4)
    got, want = limited(x_TD).assignment, plain(x_TD).assignment
    assert torch.equal(got.expert_N, want.expert_N)
    assert torch.equal(got.weight_N, want.weight_N)


def test_a_device_is_chosen_by_its_best_expert_not_by_the_sum_of_two() -> None:
    router = built(DeviceLimited(k=2, groups=2, top_groups=1), 1, 4)
    router.get_parameter("score.weight_ED").data.copy_(torch.tensor([[2.0], [-5.0], [1.5], [1.5]]))
    assert router(torch.ones(1, 1, dtype=torch.float64)).assignment.expert_N.tolist() == [0, 1]


@pytest.mark.parametrize("config", [NoisyTopK(k=2), Cosine(k=2), TopP(expected_choices=1), DeviceLimited(k=2), TopK()])
def test_a_router_made_on_the_meta_device_can_be_drawn(config: RouterConfig) -> None:
    with torch.device("meta"):
        router = config.build(4, 5)
    router.to_empty(device="cpu")
    for parameter in router.parameters():
        parameter.data.fill_(math.nan)
    for module in router.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    assert all(parameter.isfinite().all() for parameter in router.parameters())
