"""Routers that are balanced by what they are, and the one whose tokens have as many experts as fire."""

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.contracts.cases import error
from turnout import MoE, reference, total_loss
from turnout.contracts import RouterConfig
from turnout.errors import ConfigError
from turnout.losses import LoadBalance, RouterZ
from turnout.routers.base import BASE, even_assignment
from turnout.routers.expert_choice import ExpertChoice, chosen_by_experts
from turnout.routers.pieces import marked_topk
from turnout.routers.quantile import Quantile, QuantileRouter, quantile_prices
from turnout.routers.remoe import ReMoE, gate_l1, gate_shares
from turnout.routers.sinkhorn import Sinkhorn, sinkhorn_log_plan
from turnout.tensors import RouterOutput

CONFIGS: list[RouterConfig] = [
    ExpertChoice(k=1),
    ExpertChoice(k=2),
    BASE(),
    Sinkhorn(),
    Sinkhorn(k=2),
    Quantile(k=1),
    Quantile(k=2, activation="sigmoid"),
    ReMoE(k=1),
    ReMoE(k=2, balanced=False),
]


def drawn(seed: int, *shape: int) -> Tensor:
    """Numbers of a kind that changes with the seed: ordinary, on a lattice, far apart, or all of one wish."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).double()
    if seed % 4 == 1:
        return torch.randint(-1, 2, shape, generator=generator).double()
    return values * 3e4 if seed % 4 == 2 else values + torch.arange(shape[-1]) if seed % 4 == 3 else values


def router_of_logits(config: RouterConfig, num_experts: int) -> Any:
    """A router whose logits are its input."""
    router = config.build(num_experts, num_experts).double()
    (weight,) = router.parameters()
    with torch.no_grad():
        weight.copy_(torch.eye(num_experts))
    return router


def routed(config: RouterConfig, logits_RE: Tensor, *, training: bool = True) -> RouterOutput:
    return router_of_logits(config, logits_RE.shape[1]).train(training)(logits_RE)


def even(counts_E: Tensor, num_tokens: int) -> bool:
    num_experts = len(counts_E)
    return num_tokens // num_experts <= int(counts_E.min()) <= int(counts_E.max()) <= -(-num_tokens // num_experts)


# every one of them


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_extreme_and_missing_tokens_give_finite_outputs_and_every_gradient(config: Any, training: bool) -> None:
    for num_tokens, num_experts, logit in itertools.product((0, 1, 2, 9), (config.choices, 4), (0.0, 1.0, 200.0, 3e4)):
        layer = MoE(num_experts, 6, num_experts, router=config, losses=(LoadBalance(), RouterZ())).train(training)
        with torch.no_grad():
            next(layer.router.parameters()).copy_(torch.eye(num_experts))
        generator = torch.Generator().manual_seed(num_tokens)
        x_TD = (torch.randint(-1, 2, (num_tokens, num_experts), generator=generator) * logit).requires_grad_()
        out = layer(x_TD)
        (out.y.sum() + total_loss(out.losses)).backward()
        assert out.y.isfinite().all()
        assert all(term.value.isfinite() for term in out.losses)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert x_TD.grad is not None
        assert x_TD.grad.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_what_is_not_finite_ends_and_is_passed_on(config: Any) -> None:
    x_TD = torch.full((7, 4), math.nan)
    assert MoE(4, 6, 4, router=config)(x_TD).stats.num_routed == 7


@pytest.mark.parametrize("config", [c for c in CONFIGS if not isinstance(c, ExpertChoice)], ids=repr)
def test_in_evaluation_a_token_is_routed_as_if_it_were_alone(config: Any) -> None:
    logits_RE = drawn(0, 12, 4)
    together = routed(config, logits_RE, training=False).assignment
    for t in range(12):
        alone = routed(config, logits_RE[t : t + 1], training=False).assignment
        assert torch.equal(together.expert_N[together.token_N == t], alone.expert_N)
        assert torch.equal(together.weight_N[together.token_N == t], alone.weight_N)


# expert choice


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), num_tokens=st.integers(0, 13), num_experts=st.integers(1, 7), k=st.integers(1, 7))
def test_each_expert_takes_its_best_tokens_and_weighs_them_by_the_full_softmax(
    seed: int, num_tokens: int, num_experts: int, k: int
) -> None:
    k, logits_RE = min(k, num_experts), drawn(seed, num_tokens, num_experts)
    routing = routed(ExpertChoice(k=k), logits_RE)
    assignment, per_expert = routing.assignment, math.ceil(k * num_tokens / num_experts)
    assert assignment.counts_E.tolist() == [per_expert] * num_experts
    score_RE = logits_RE.log_softmax(dim=1)
    want = {(t, e) for e, best in enumerate(reference.best_experts(score_RE.T, per_expert).tolist()) for t in best}
    got = list(zip(assignment.token_N.tolist(), assignment.expert_N.tolist(), strict=True))
    assert got == sorted(want), "token by token"
    assert error(assignment.weight_N, reference.softmax(logits_RE)[assignment.token_N, assignment.expert_N]) < 1e-14


@pytest.mark.parametrize("config", [ExpertChoice(k=3), ReMoE(k=2)], ids=repr)
def test_the_choices_of_a_token_are_numbered_from_its_highest_weight(config: Any) -> None:
    for seed in range(12):
        assignment = routed(config, drawn(seed, 11, 6)).assignment
        for t in range(11):
            mine = assignment.token_N == t
            weights, experts = assignment.weight_N[mine].tolist(), assignment.expert_N[mine].tolist()
            ranked = sorted(range(len(weights)), key=lambda i, w=weights, e=experts: (-w[i], e[i]))
            assert assignment.choice_N[mine].tolist() == [ranked.index(i) for i in range(len(ranked))]


def test_a_token_alone_goes_to_every_expert_by_expert_choice() -> None:
    assert chosen_by_experts(torch.randn(1, 8), 1).all()


def test_the_order_of_distinct_tokens_does_not_matter_to_expert_choice() -> None:
    logits_RE, order_R = drawn(0, 33, 5), torch.randperm(33, generator=torch.Generator().manual_seed(1))
    for k in (1, 2, 5):
        chosen_RE = chosen_by_experts(logits_RE.log_softmax(dim=1), k)
        assert torch.equal(chosen_by_experts(logits_RE[order_R].log_softmax(dim=1), k), chosen_RE[order_R])


def test_expert_choice_is_refused_in_a_decoder_unless_asked_for() -> None:
    with pytest.raises(
        ConfigError, match=r"depend on later tokens: .* k \* log2\(E / k - 1\) bits .*in_decoder='allow'"
    ):
        ExpertChoice().check_decoder()
    ExpertChoice(in_decoder="allow").check_decoder()


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), width=st.integers(1, 40), kinds=st.integers(1, 40))
def test_marked_topk_marks_what_a_stable_sort_puts_first(seed: int, rows: int, width: int, kinds: int) -> None:
    """Few kinds of scores: many ties."""
    generator = torch.Generator().manual_seed(seed)
    scores_AB = torch.randint(kinds, (rows, width), generator=generator).double()
    scores_AB = scores_AB.masked_fill(scores_AB == 0, -torch.inf)
    for k in {1, (width + 1) // 2, width}:
        want = torch.zeros(rows, width, dtype=torch.bool)
        want.scatter_(1, scores_AB.sort(dim=1, descending=True, stable=True).indices[:, :k], True)
        assert torch.equal(marked_topk(scores_AB, k), want)


def test_expert_choice_sees_later_tokens() -> None:
    """What the guard is for: another last token changes the first one's experts."""
    logits_RE = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    later_RE = torch.tensor([[1.0, 0.0], [9.0, 0.0]])
    mine = [chosen_by_experts(value.log_softmax(dim=1), 1)[0].tolist() for value in (logits_RE, later_RE)]
    assert mine == [[True, False], [False, True]]


# BASE


@settings(max_examples=120)
@given(seed=st.integers(0, 10**6), num_tokens=st.integers(0, 6), num_experts=st.integers(1, 4))
def test_the_assignment_is_even_and_within_its_bound_of_the_best(seed: int, num_tokens: int, num_experts: int) -> None:
    scores_RE = drawn(seed, num_tokens, num_experts)
    for precision in (1e-6, 1e-2):
        expert_R = even_assignment(scores_RE, precision=precision)
        assert even(torch.bincount(expert_R, minlength=num_experts), num_tokens)
        most, spread = best_even_sum(scores_RE), spread_of(scores_RE)
        assert value_of(scores_RE, expert_R) >= most - num_tokens * precision * spread - 1e-9 * abs(most)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(64, 8), (100, 7), (37, 5), (5, 16), (128, 16), (600, 12)])
@pytest.mark.parametrize("kind", ["whole", "clustered", "lopsided"])
def test_no_even_assignment_of_whole_scores_is_better_by_scipy(num_tokens: int, num_experts: int, kind: str) -> None:
    """Scores that are whole multiples of a step are not rounded: the sum is the greatest, not near it."""
    for seed in range(4):
        scores_RE = whole_scores(kind, num_tokens, num_experts, seed)
        expert_R = even_assignment(scores_RE, precision=1 / spread_of(scores_RE))
        assert even(torch.bincount(expert_R, minlength=num_experts), num_tokens)
        assert value_of(scores_RE, expert_R) == value_of(scores_RE, scipy_assignment(scores_RE))


def whole_scores(kind: str, num_tokens: int, num_experts: int, seed: int) -> Tensor:
    """Whole numbers of a spread of 512 a token; a float's step of `1 / 512` is exact."""
    generator = torch.Generator().manual_seed(seed)
    rows = 3 if kind == "clustered" else num_tokens
    scores_RE = torch.randint(1, 512, (rows, num_experts), generator=generator).double()
    if kind == "lopsided":
        scores_RE = (scores_RE / 16).ceil() + torch.randint(1, 480, (num_experts,), generator=generator)
    scores_RE = scores_RE[torch.randint(rows, (num_tokens,), generator=generator)]
    best_R1 = scores_RE.argmax(dim=1, keepdim=True)
    worst_R1 = scores_RE.scatter(1, best_R1, torch.inf).argmin(dim=1, keepdim=True)
    return scores_RE.scatter(1, best_R1, 512.0).scatter(1, worst_R1, 0.0)


def scipy_assignment(scores_RE: Tensor) -> Tensor:
    """By one place of every expert after the other; a place that stays idle is a row that only last places take."""
    num_tokens, num_experts = scores_RE.shape
    size = -(-num_tokens // num_experts)
    worth_NN = torch.zeros(size * num_experts, size * num_experts, dtype=torch.float64)
    worth_NN[:num_tokens] = scores_RE.repeat_interleave(size, dim=1)
    worth_NN[num_tokens:, torch.arange(size * num_experts) % size != 0] = -torch.inf
    places = linear_sum_assignment(worth_NN.numpy(), maximize=True)[1]
    return torch.as_tensor(places[:num_tokens]) // size


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_tokens_that_are_all_alike_take_no_longer(noise: float) -> None:
    """They tie, and move together: as many paths as experts, not as tokens."""
    generator = torch.Generator().manual_seed(0)
    scores_RE = torch.randn(1, 64, generator=generator) + noise * torch.randn(8192, 64, generator=generator)
    start = time.process_time()
    expert_R = even_assignment(scores_RE, precision=1e-4)
    assert torch.bincount(expert_R, minlength=64).unique().tolist() == [128]
    assert time.process_time() - start < 5


def best_even_sum(scores_RE: Tensor) -> float:
    """By trying every assignment."""
    num_tokens, num_experts = scores_RE.shape
    rows = scores_RE.tolist()
    return max(
        sum(row[e] for row, e in zip(rows, chosen, strict=True))
        for chosen in itertools.product(range(num_experts), repeat=num_tokens)
        if even(torch.tensor([chosen.count(e) for e in range(num_experts)]), num_tokens)
    )


def value_of(scores_RE: Tensor, expert_R: Tensor) -> float:
    return float(scores_RE.gather(1, expert_R.unsqueeze(1)).sum())


def spread_of(scores_RE: Tensor) -> float:
    return float((scores_RE.amax(dim=1) - scores_RE.amin(dim=1)).max()) if len(scores_RE) else 0.0


def test_base_is_even_in_training_greedy_in_evaluation_and_weighs_by_the_sigmoid() -> None:
    logits_RE = drawn(3, 23, 4)
    training, evaluation = (routed(BASE(), logits_RE, training=flag).assignment for flag in (True, False))
    assert even(training.counts_E, 23)
    assert torch.equal(evaluation.expert_N, logits_RE.argmax(dim=1))
    for assignment in (training, evaluation):
        want_N = 1 / (1 + torch.exp(-logits_RE[torch.arange(23), assignment.expert_N]))
        assert error(assignment.weight_N, want_N) < 1e-14


def test_tokens_that_all_tie_are_still_spread_evenly() -> None:
    assert routed(BASE(), torch.zeros(12, 4)).assignment.counts_E.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_weights_of_base_are_orthogonal_and_short(dtype: torch.dtype) -> None:
    router = BASE().build(16, 6).to(dtype)
    router.reset_parameters()  # type: ignore[operator]
    weight_ED = router.get_parameter("weight_ED").float()
    assert error(weight_ED @ weight_ED.T, 0.01 * torch.eye(6).double()) < (1e-6 if dtype == torch.float32 else 1e-3)


# Sinkhorn


def test_the_sinkhorn_plan_is_that_of_the_plain_loop() -> None:
    for seed in range(8):
        logits_RE = drawn(4 * seed, 9, 4)
        plan_RE = sinkhorn_log_plan(logits_RE, tolerance=1e-12, max_rounds=300).exp()
        assert error(plan_RE, plain_sinkhorn(logits_RE, rounds=300)) < 1e-9


def plain_sinkhorn(logits_RE: Tensor, rounds: int) -> Tensor:
    """Without logarithms."""
    num_tokens, num_experts = logits_RE.shape
    k_RE, d0_R, d1_E = torch.exp(logits_RE), torch.ones(num_tokens).double(), torch.ones(num_experts).double()
    for _ in range(rounds):
        d0_R = 1 / (num_tokens * (k_RE * d1_E).sum(dim=1))
        d1_E = 1 / (num_experts * (k_RE * d0_R[:, None]).sum(dim=0))
    return d0_R[:, None] * k_RE * d1_E


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (1, 5), (12, 1), (40, 8), (7, 16)])
def test_the_sinkhorn_plan_wants_every_expert_equally_and_every_token_once(num_tokens: int, num_experts: int) -> None:
    for seed in range(12):
        plan_RE = sinkhorn_log_plan(drawn(seed, num_tokens, num_experts), tolerance=1e-4, max_rounds=100).exp()
        assert error(num_experts * plan_RE.sum(dim=0), torch.ones(num_experts).double()) < 1e-9
        if seed % 4 != 2:
            # numbers far apart need more rounds than that
            assert error(num_tokens * plan_RE.sum(dim=1), torch.ones(num_tokens).double()) < 0.01


def test_sinkhorn_chooses_by_the_plan_in_training_and_weighs_by_the_logits() -> None:
    logits_RE = drawn(3, 200, 4)
    for k in (1, 2):
        training, evaluation = (routed(Sinkhorn(k=k), logits_RE, training=flag).assignment for flag in (True, False))
        assert torch.equal(evaluation.as_topk()[0], reference.best_experts(logits_RE, k))
        assert int(training.counts_E.max()) < 1.25 * 200 * k / 4 < 1.5 * 200 * k / 4 < int(evaluation.counts_E.max())
        gate_RE = 1 / (1 + torch.exp(-logits_RE)) if k == 1 else reference.softmax(logits_RE)
        assert error(training.weight_N, gate_RE[training.token_N, training.expert_N]) < 1e-14


# quantile balancing


def test_a_round_of_prices_is_the_one_of_the_source() -> None:
    for seed in range(8):
        num_tokens, num_experts, k = 5 + seed, 3 + seed % 3, 1 + seed % 2
        rows = drawn(seed, num_tokens, num_experts).tolist()
        price = [0.0] * num_experts
        for _ in range(3):
            threshold = [sorted((s - p for s, p in zip(row, price, strict=True)), reverse=True)[k] for row in rows]
            fair = num_tokens * k // num_experts
            assert fair > 0
            price = [
                sorted((row[e] - a for row, a in zip(rows, threshold, strict=True)), reverse=True)[fair]
                for e in range(num_experts)
            ]
        got_E = quantile_prices(torch.tensor(rows, dtype=torch.float64), k, rounds=3)
        assert error(got_E, torch.tensor(price, dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 2), (16, 4)])
def test_prices_by_quantile_even_the_loads_of_a_crowded_batch(num_experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    logits_RE = torch.randn(1024, num_experts, generator=generator).double() + torch.linspace(0, 2, num_experts)
    fair = 1024 * k / num_experts
    config = Quantile(k=k, rounds=8)
    training, evaluation = (routed(config, logits_RE, training=flag).assignment for flag in (True, False))
    assert int(evaluation.counts_E.max()) > 1.5 * fair
    assert int(training.counts_E.max()) < 1.1 * fair
    assert int(training.counts_E.min()) > 0.9 * fair


def test_evaluation_balances_by_the_average_of_the_steps_prices() -> None:
    torch.manual_seed(0)
    layer = MoE(8, 4, 6, router=Quantile(k=2, rounds=8, memory=0.5, init_std=1.0), losses=())
    router = layer.router
    assert isinstance(router, QuantileRouter)
    x_TD = torch.randn(600, 8) + torch.randn(8)
    crowd = int(layer.eval()(x_TD).stats.assigned_E.max())
    halves = [layer.train()(half).stats for half in x_TD.split([200, 400])]
    router.after_step(halves[0] + halves[1])
    logits = [router(half).logits_RE.detach() for half in x_TD.split([200, 400])]
    first, second = (quantile_prices(logits_RE, 2, rounds=8) for logits_RE in logits)
    torch.testing.assert_close(router.price_E, (first + 2 * second) / 3)
    average_E = router.price_E.clone()
    assert crowd > 1.5 * 200 > 1.2 * int(layer.eval()(x_TD).stats.assigned_E.max())
    router.after_step(layer.train()(x_TD[:200]).stats)
    third = quantile_prices(logits[0], 2, rounds=8, start_E=average_E)
    torch.testing.assert_close(router.price_E, (average_E + third) / 2)
    router.after_step(layer.eval()(x_TD).stats)
    assert layer.bfloat16().router.get_buffer("price_E").dtype == torch.float32


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(1, 8, 2), (4, 64, 2), (8, 64, 1), (31, 64, 2)])
def test_fewer_choices_than_experts_go_where_tokens_want_them(num_tokens: int, num_experts: int, k: int) -> None:
    """A fair share of none would price every token out of every expert, and ties go to the first of them."""
    logits_RE = drawn(num_tokens, num_tokens, num_experts)
    assignment = routed(Quantile(k=k), logits_RE, training=True).assignment
    assert torch.equal(assignment.as_topk()[0], reference.best_experts(logits_RE, k))


def test_quantile_prices_choose_but_do_not_weigh() -> None:
    logits_RE = drawn(3, 50, 6)
    for activation in ("softmax", "sigmoid"):
        for training in (True, False):
            assignment = routed(
                Quantile(k=2, activation=activation, scale=2.5), logits_RE, training=training
            ).assignment
            gate_RE = reference.softmax(logits_RE) if activation == "softmax" else 1 / (1 + torch.exp(-logits_RE))
            assert error(assignment.weight_N, 2.5 * gate_RE[assignment.token_N, assignment.expert_N]) < 1e-14
        assert torch.equal(assignment.as_topk()[0], reference.best_experts(logits_RE, 2))


def test_two_rounds_a_call_are_enough_from_the_average_of_the_calls_before() -> None:
    torch.manual_seed(0)
    layer = MoE(32, 4, 32, router=Quantile(k=2, init_std=1.0), losses=())
    offset_D, worst = 4 * torch.randn(32), []
    for _ in range(8):
        stats = layer(torch.randn(1600, 32) + offset_D).stats
        worst.append(int(stats.assigned_E.max()) / 100)
        layer.router.after_step(stats)
    assert worst[0] > 1.25 > 1.15 > max(worst[1:])


def test_where_every_token_takes_every_expert_there_is_no_price() -> None:
    assert quantile_prices(torch.randn(5, 3), 3, rounds=2).tolist() == [0.0] * 3
    assert quantile_prices(torch.randn(0, 3), 1, rounds=2).tolist() == [0.0] * 3


# ReMoE


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), num_tokens=st.integers(0, 9), num_experts=st.integers(1, 6), growths=st.integers(0, 90)
)
def test_remoe_sends_tokens_to_the_experts_that_fire_and_returns_the_term_of_the_paper(
    seed: int, num_tokens: int, num_experts: int, growths: int
) -> None:
    logits_RE = drawn(seed, num_tokens, num_experts).requires_grad_()
    rows = [[max(value, 0.0) for value in row] for row in logits_RE.tolist()]
    fired = [(t, e) for t, row in enumerate(rows) for e, gate in enumerate(row) if gate > 0]
    load = [num_experts / max(num_tokens, 1) * sum(row[e] > 0 for row in rows) for e in range(num_experts)]
    for k, balanced in itertools.product({1, min(2, num_experts), num_experts}, (True, False)):
        router = router_of_logits(ReMoE(k=k, balanced=balanced), num_experts)
        router.growths.fill_(growths)
        routing = router(logits_RE)
        assignment = routing.assignment
        assert list(zip(assignment.token_N.tolist(), assignment.expert_N.tolist(), strict=True)) == fired
        assert assignment.weight_N.tolist() == [rows[t][e] for t, e in fired]
        (term,) = routing.losses
        l1 = sum(gate * (load[e] / k if balanced else 1.0) for row in rows for e, gate in enumerate(row))
        want = 1e-8 * 1.2**growths * l1 / max(num_tokens, 1)
        assert (term.name, term.coefficient) == ("relu_l1", 1.0)
        assert math.isclose(float(term.value.detach()), want, rel_tol=1e-12)
        # the load is a count: the gradient is the gates' alone
        (grad_RE,) = torch.autograd.grad(term.value, logits_RE)
        pull = torch.tensor([share / k if balanced else 1.0 for share in load], dtype=logits_RE.dtype)
        want_RE = 1e-8 * 1.2**growths / max(num_tokens, 1) * pull * (logits_RE > 0)
        assert torch.allclose(grad_RE, want_RE, rtol=1e-12, atol=0)
        assert error(routing.scores_RE.sum(dim=1), torch.ones(num_tokens).double()) < 1e-14


def test_gates_become_shares_and_without_a_gate_all_are_equal() -> None:
    share_RE = gate_shares(torch.tensor([[30.0, 10.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert torch.allclose(share_RE, torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.25] * 4]), rtol=0, atol=1e-4)


def test_the_gradient_of_a_share_is_bounded_where_gates_are_tiny() -> None:
    gates_RE = torch.full((1, 4), 1e-30, requires_grad=True)
    gate_shares(gates_RE)[0, 0].backward()
    assert gates_RE.grad is not None
    assert float(gates_RE.grad.abs().max()) < 1e4


def test_the_strength_grows_above_the_target_shrinks_below_it_and_rests_upon_it() -> None:
    layer = MoE(8, 6, 4, router=ReMoE(k=2))
    router: Any = layer.router
    stats = layer(torch.randn(10, 8)).stats
    steps = (([9, 9, 2, 1], 1), ([6, 5, 5, 5], 2), ([5, 5, 5, 5], 2), ([5, 5, 5, 4], 1), ([0] * 4, 0), ([0] * 4, 0))
    for assigned, want in steps:
        router.after_step(replace(stats, assigned_E=torch.tensor(assigned)))
        assert int(router.growths) == want
    router.growths.fill_(7)
    router.after_step(replace(stats, assigned_E=torch.zeros(4, dtype=torch.int64), num_routed=torch.tensor(0)))
    assert int(router.growths) == 7, "a step without tokens says nothing"


def test_about_half_the_experts_of_a_new_remoe_fire() -> None:
    for seed in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assignment = ReMoE().build(64, 16)(torch.randn(500, 64)).assignment
        assert 0.4 < len(assignment.token_N) / (500 * 16) < 0.6


@pytest.mark.parametrize("k", [1, 3])
def test_the_adapted_l1_brings_the_number_of_experts_to_its_target(k: int) -> None:
    """Trained on the term against a main loss that wants every gate above 0."""
    generator = torch.Generator().manual_seed(k)
    x_TD, wanted_TE = torch.randn(64, 16, generator=generator), torch.rand(64, 8, generator=generator)
    # what tokens have in common: without it about half the logits of any weights are above 0
    x_TD[:, 0] = 3.0
    router: Any = ReMoE(k=k).build(16, 8)
    with torch.no_grad():
        next(router.parameters()).normal_(std=0.1, generator=generator)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    stats, per_token = MoE(16, 4, 8)(x_TD).stats, []
    for _ in range(300):
        routing = router(x_TD)
        loss = (routing.logits_RE.relu() - wanted_TE).square().mean() + total_loss(routing.losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counts_E = routing.assignment.counts_E
        router.after_step(replace(stats, assigned_E=counts_E))
        per_token.append(float(counts_E.sum()) / 64)
    assert max(per_token) > 6
    assert abs(sum(per_token[-100:]) / 100 - k) < 0.2 * k


def test_a_target_that_cannot_be_met_does_not_let_the_strength_overflow() -> None:
    router: Any = ReMoE(k=1, start=1e-3, growth=2.0, limit=1.0).build(8, 4)
    stats = replace(MoE(8, 6, 4)(torch.randn(10, 8)).stats, assigned_E=torch.full((4,), 9))
    for _ in range(2000):
        router.after_step(stats)
    assert int(router.growths) == 9, "2 ** 9 * 1e-3 is at most 1, 2 ** 10 * 1e-3 is not"


def test_the_strength_of_remoe_survives_bfloat16_and_a_checkpoint() -> None:
    router: Any = ReMoE().build(8, 4)
    router.growths.fill_(57)
    other: Any = ReMoE().build(8, 4).bfloat16()
    other.load_state_dict(router.bfloat16().state_dict())
    assert (int(other.growths), other.growths.dtype) == (57, torch.int64)


def test_without_tokens_the_l1_term_is_zero() -> None:
    assert gate_l1(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int64), 2).item() == 0
