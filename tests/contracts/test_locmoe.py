"""LocMoE and LocMoE+ are what their papers print: gate, affinity, choice, switch and locality loss."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turnout import MoE, reference, total_loss
from turnout.contracts import Loss
from turnout.dispatch import AffinityThreshold, Dropless, FixedCapacity, TutelCapacity
from turnout.errors import ConfigError
from turnout.losses import LoadBalance
from turnout.losses.locality import Locality, local_distribution
from turnout.placement import Placement, Site
from turnout.ranking import keep_best
from turnout.routers.affinity_theory import capacity_floor
from turnout.routers.grap import block_means, grap_affinity, grap_rows, row_affinity
from turnout.routers.locmoe import LocMoE, LocMoERouter
from turnout.routers.locmoe_plus import LocMoEPlus, LocMoEPlusRouter
from turnout.tensors import Assignment, MoEStats, RouterOutput

SIZES = ((6, 3), (12, 4), (8, 1), (5, 5), (16, 8))  # width, experts


def drawn(number: int, num_tokens: int, dim: int) -> Tensor:
    """Every third case lies on a lattice, where affinities often tie; some tokens are zero."""
    generator = torch.Generator().manual_seed(number)
    if number % 3 == 0:
        return (torch.randint(-2, 3, (num_tokens, dim), generator=generator) / 2).double()
    x_TD = torch.randn(num_tokens, dim, generator=generator).double()
    return x_TD * (torch.rand(num_tokens, 1, generator=generator) < 0.9)


# gate and affinity


@pytest.mark.parametrize(("dim", "num_experts"), SIZES)
def test_the_gate_is_the_product_with_its_rows_and_the_affinity_their_cosine(dim: int, num_experts: int) -> None:
    x_TD, rows_ED = drawn(1, 50, dim), grap_rows(dim, num_experts)
    gram_EE = torch.eye(num_experts, dtype=torch.float64) * num_experts / dim
    torch.testing.assert_close(rows_ED @ rows_ED.T, gram_EE, rtol=0, atol=1e-15)
    torch.testing.assert_close(block_means(x_TD, num_experts), x_TD @ rows_ED.T, rtol=0, atol=1e-14)
    affinity_TE = grap_affinity(x_TD, num_experts)
    cosine_TE = torch.nn.functional.cosine_similarity(x_TD.unsqueeze(1), rows_ED.unsqueeze(0), dim=2)
    torch.testing.assert_close(affinity_TE, cosine_TE, rtol=0, atol=1e-14)
    torch.testing.assert_close(affinity_TE, row_affinity(x_TD, rows_ED), rtol=0, atol=1e-14)
    assert (affinity_TE.square().sum(dim=1) <= 1 + 1e-14).all()


def test_a_token_made_of_gate_rows_has_affinities_whose_squares_sum_to_one() -> None:
    x_TD = torch.randn(20, 4, dtype=torch.float64) @ grap_rows(12, 4)
    torch.testing.assert_close(grap_affinity(x_TD, 4).square().sum(dim=1), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("affinity", [lambda x: grap_affinity(x, 3), lambda x: row_affinity(x, x[:3])])
def test_affinities_and_their_gradients_are_finite_for_a_zero_token(affinity: Callable[[Tensor], Tensor]) -> None:
    x_TD = torch.zeros(4, 6).index_fill(0, torch.tensor([1]), 3e4).requires_grad_()
    affinity_TE = affinity(x_TD)
    affinity_TE.sum().backward()
    assert not affinity_TE[0].any()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()


def test_affinities_pass_gradcheck() -> None:
    x_TD = drawn(2, 5, 6).add(0.05).requires_grad_()
    weight_ED = drawn(1, 3, 6).add(0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grap_affinity(x, 3), [x_TD])
    assert torch.autograd.gradcheck(row_affinity, [x_TD, weight_ED])


def test_grap_needs_experts_that_divide_the_width() -> None:
    for config in (LocMoE(), LocMoEPlus()):
        with pytest.raises(ConfigError, match=r"num_experts=5 must divide dim=12; legal: \[1, 2, 3, 4, 6, 12\]"):
            config.build(12, 5)
    LocMoEPlus(gate="learned").build(12, 5)


# LocMoE


@pytest.mark.parametrize("relu", [False, True])
def test_locmoe_takes_the_smallest_angle_with_its_softmax_weight(relu: bool) -> None:
    """Lemma 1: rows of equal norm."""
    router = LocMoE(relu=relu).build(12, 4).double()
    x_TD = drawn(1, 200, 12)
    x_TD = x_TD[(grap_affinity(x_TD, 4) > 0).any(dim=1)]
    routing: RouterOutput = router(x_TD)
    expert_T1, weight_T1 = routing.assignment.as_topk()
    assert torch.equal(expert_T1, reference.best_experts(x_TD @ grap_rows(12, 4).T, 1))
    assert torch.equal(expert_T1, reference.best_experts(grap_affinity(x_TD, 4), 1))
    logits_TE = x_TD @ grap_rows(12, 4).T
    want_TE = reference.softmax(logits_TE.clamp(min=0) if relu else logits_TE)
    torch.testing.assert_close(weight_T1, want_TE.gather(1, expert_T1), rtol=0, atol=1e-14)
    assert (routing.logits_RE >= 0).all() or not relu


def test_tokens_uniform_on_the_sphere_reach_every_expert_alike() -> None:
    """Lemma 2; the direction of a normal token is uniform."""
    num_tokens, num_experts = 40_000, 8
    x_TD = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(0))
    share_E = LocMoE().build(32, num_experts)(x_TD).assignment.counts_E / num_tokens
    deviation = math.sqrt((1 - 1 / num_experts) / num_experts / num_tokens)
    assert float((share_E - 1 / num_experts).abs().max()) < 4 * deviation


def test_the_capacity_of_theorem_1_is_measured_on_the_first_step_and_kept() -> None:
    layer = MoE(12, 4, 4, router=LocMoE(), capacity=FixedCapacity(factor=0.1))
    aimed_TD = grap_rows(12, 4)[:1].expand(40, 12).float()
    first_TD = drawn(1, 40, 12).float() + 4 * aimed_TD
    first = layer(first_TD).stats
    assert isinstance(layer.router, LocMoERouter)
    assert int(layer(aimed_TD).stats.dropped_capacity_E.sum()) == 39, "a batch measures nothing by itself"
    layer.router.after_step(first + layer(first_TD).stats)
    mean = float(grap_affinity(first_TD, 4).amax(dim=1).mean())
    want = math.ceil(capacity_floor(mean, 12, 4))
    assert int(layer.router.least_capacity) == want
    assert 1 < want < 40
    # a second step measures nothing
    layer.router.after_step(layer(aimed_TD).stats)
    for training in (True, False):
        assert int(layer.train(training)(aimed_TD).stats.dropped_capacity_E.sum()) == 40 - want
    for capacity in (TutelCapacity(factor=0.1), AffinityThreshold(threshold=0.01, factor=0.1)):
        other = MoE(12, 4, 4, router=layer.router, capacity=capacity)
        kept = other(aimed_TD).stats
        assert int((kept.assigned_E - kept.dropped_capacity_E - kept.dropped_policy_E).sum()) == want


def test_theorem_1_may_be_left_out() -> None:
    layer = MoE(12, 4, 4, router=LocMoE(floor="none"), capacity=FixedCapacity(factor=0.1))
    stats = layer(grap_rows(12, 4)[:1].expand(40, 12).float()).stats
    layer.router.after_step(stats)
    assert int(layer.router.get_buffer("least_capacity")) == 0


# the locality loss


def value_of(loss: Loss, scores_RE: Tensor) -> Tensor:
    """The term for tokens of these scores."""
    expert_R = scores_RE.argmax(dim=1)
    assignment = Assignment(
        token_N=torch.arange(len(scores_RE)),
        expert_N=expert_R,
        weight_N=torch.ones(len(scores_RE)),
        choice_N=torch.zeros_like(expert_R),
        num_tokens=len(scores_RE),
        num_experts=scores_RE.shape[1],
        top_k=1,
    )
    routing = RouterOutput(
        assignment=assignment, logits_RE=scores_RE, scores_RE=scores_RE, token_R=torch.arange(len(scores_RE))
    )
    return loss.term(routing, Dropless().admit(assignment), sequence_length=1).value


def by_loops(scores_RE: Tensor, local: tuple[int, ...], epsilon: float) -> float:
    """KL(D_c || D_l) as LocMoE writes it, D_l with epsilon on the other nodes."""
    num_experts, found = scores_RE.shape[1], 0.0
    for expert in range(num_experts):
        current = math.fsum(scores_RE[:, expert].tolist()) / len(scores_RE)
        aim = (1 - epsilon) / len(local) if expert in local else epsilon / (num_experts - len(local))
        found -= current * math.log(aim / current)
    return found


@pytest.mark.parametrize("local", [(2, 3), (0,), (5,), (0, 2, 3, 5), (1, 2, 3, 4, 5)])
def test_the_locality_loss_is_the_divergence_from_the_local_distribution(local: tuple[int, ...]) -> None:
    scores_RE = drawn(1, 9, 6).softmax(dim=1)
    loss = Locality(local=local, epsilon=0.1)
    assert abs(value_of(loss, scores_RE).item() - by_loops(scores_RE, local, 0.1)) < 1e-14
    local_E = local_distribution(scores_RE, local, 0.1)
    assert abs(local_E.sum().item() - 1) < 1e-15
    assert abs(value_of(loss, local_E.expand(4, 6)).item()) < 1e-15


def test_a_node_of_two_has_half_of_what_may_stay_on_each_expert() -> None:
    assert local_distribution(torch.ones(1, 6).double(), (2, 3), 0.1).tolist() == [
        0.025,
        0.025,
        0.45,
        0.45,
        0.025,
        0.025,
    ]


def test_the_locality_loss_moves_the_tokens_to_their_node() -> None:
    scores_RE = torch.full((5, 4), 0.25, requires_grad=True)
    value_of(Locality(local=(1, 3)), scores_RE).backward()
    assert scores_RE.grad is not None
    assert (scores_RE.grad[:, [1, 3]] < scores_RE.grad[:, [0, 2]].min()).all()


def test_missing_experts_and_no_tokens_are_finite() -> None:
    one_hot_RE = torch.zeros(3, 4).index_fill(1, torch.tensor([2]), 1.0).requires_grad_()
    value = value_of(Locality(local=(0, 1)), one_hot_RE)
    value.backward()
    assert abs(value.item() - math.log(2 / 0.05)) < 1e-6
    assert one_hot_RE.grad is not None
    assert one_hot_RE.grad.isfinite().all()
    assert value_of(Locality(local=(0, 1)), torch.zeros(0, 4)).item() == 0


def test_with_every_expert_near_the_locality_loss_and_its_gradient_are_zero() -> None:
    """In one process, and wherever the layout has all experts on one node."""
    one_node = Site(placement=Placement((0, 1, 4)), node_size=2, rank=1)
    for loss in (Locality(), Locality().placed(Site.alone(4)), Locality().placed(one_node)):
        scores_RE = drawn(1, 9, 4).softmax(dim=1).requires_grad_()
        value = value_of(loss, scores_RE)
        value.backward()
        assert value.item() == 0
        assert scores_RE.grad is not None
        assert not scores_RE.grad.any()


@pytest.mark.parametrize("rank", range(4))
def test_the_layout_says_which_experts_are_near_unevenly_placed_ones_too(rank: int) -> None:
    bounds = (0, 3, 4, 6, 7)
    site = Site(placement=Placement(bounds), node_size=2, rank=rank)
    layer = MoE(14, 4, 7, router=LocMoE(), losses=(LoadBalance(), Locality(coefficient=0.3, epsilon=0.2))).double()
    x_TD = drawn(1, 20, 14)
    layer.stand(site)
    near = ((0, 1, 2, 3), (4, 5, 6))[rank // 2]
    assert layer.losses == (LoadBalance(), Locality(coefficient=0.3, epsilon=0.2, local=near))
    routing: RouterOutput = layer.router(x_TD)
    term = layer(x_TD).losses[-1]
    assert abs(term.value.item() - by_loops(routing.scores_RE, near, 0.2)) < 1e-14
    # from the settings anew, not from what was told before
    layer.stand(replace(site, rank=3 - rank))
    assert layer(x_TD).losses[-1].value.item() != term.value.item()


def test_training_by_the_locality_loss_keeps_tokens_on_the_node() -> None:
    torch.manual_seed(0)
    loss = Locality(coefficient=1.0, local=(2, 3), epsilon=0.05)
    layer = MoE(12, 4, 6, router=LocMoEPlus(gate="learned", mode="token_choice"), losses=(loss,))
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    x_TD = torch.randn(256, 12) + 0.5

    def local_share() -> float:
        counts_E = layer(x_TD).stats.assigned_E
        return float(counts_E[2:4].sum() / counts_E.sum())

    before = local_share()
    for _ in range(60):
        optimizer.zero_grad()
        total_loss(layer(x_TD).losses).backward()
        optimizer.step()
    assert local_share() > max(0.8, before)


# LocMoE+


def kept_by_loops(affinity_TE: Tensor, asked: list[list[int]], config: LocMoEPlus, floor: int) -> set[tuple[int, int]]:
    """The pairs (token, expert) kept, where asked[e] are the tokens that expert e may keep."""
    num_tokens, num_experts = affinity_TE.shape
    # in whole hundredths, so that 1.1 * 10 is 11
    most = -(-round(config.factor * 100) * num_tokens * config.k // (num_experts * 100))
    kept = set()
    for expert, tokens in enumerate(asked):
        score = affinity_TE[:, expert].tolist()
        best_first = sorted(tokens, key=lambda t: (-score[t], t))
        total = math.fsum(max(score[t], 0.0) for t in tokens)
        wanted, reached = 0, 0.0
        while wanted < len(tokens) and reached < config.threshold * total * (1 - 1e-9):
            reached = math.fsum(max(score[t], 0.0) for t in best_first[: wanted + 1])
            wanted += 1
        number = min(max(wanted, floor), max(most, config.minimum))
        kept |= {(token, expert) for token in best_first[:number]}
    return kept


def floor_by_hand(affinity_TE: Tensor, dim: int, config: LocMoEPlus) -> int:
    num_tokens, num_experts = affinity_TE.shape
    if config.floor == "none" or num_tokens == 0:
        return config.minimum
    best = [max(row) for row in affinity_TE.tolist()]
    delta = max(0.0, min(1.0, max(best) if config.floor == "largest" else sum(best) / len(best)))
    value = math.exp(min(dim * delta**2 / (2 - delta**2), 700)) / num_experts
    return min(max(math.ceil(min(value, 1e9)), config.minimum), num_tokens)


def random_plus(rng: random.Random, **changes: Any) -> LocMoEPlus:
    return LocMoEPlus(
        **{
            "k": rng.randint(1, 3),
            "gate": rng.choice(["grap", "learned"]),
            "floor": rng.choice(["mean", "largest", "none", "none"]),
            "threshold": rng.choice([0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0]),
            "factor": rng.choice([0.25, 0.5, 1.0, 1.1, 2.0, 9.0]),
            "minimum": rng.choice([0, 1, 3]),
            **changes,
        }
    )


@pytest.mark.parametrize("mode", ["hybrid", "expert_choice"])
def test_what_experts_keep_equals_the_loops(mode: str) -> None:
    for number in range(300):
        rng = random.Random(number)
        dim, num_experts = rng.choice([size for size in SIZES if size[1] >= 3])
        config = random_plus(rng, mode=mode)
        router = config.build(dim, num_experts).double()
        assert isinstance(router, LocMoEPlusRouter)
        x_TD = drawn(number, rng.randint(0, 40), dim)
        routing: RouterOutput = router(x_TD)
        rows_ED = None if router.score is None else router.score.weight_ED.detach()
        affinity_TE = grap_affinity(x_TD, num_experts) if rows_ED is None else row_affinity(x_TD, rows_ED)
        chosen = reference.best_experts(affinity_TE, config.k).tolist()
        everyone = range(len(x_TD))
        asked = [[t for t in everyone if mode != "hybrid" or e in chosen[t]] for e in range(num_experts)]
        want = kept_by_loops(affinity_TE, asked, config, floor_by_hand(affinity_TE, dim, config))
        assignment = routing.assignment
        keep_N = torch.ones_like(assignment.token_N).bool()
        if assignment.declined_N is not None:
            keep_N = ~assignment.declined_N
        pairs = zip(assignment.token_N[keep_N].tolist(), assignment.expert_N[keep_N].tolist(), strict=True)
        assert set(pairs) == want, (number, config)
        if mode == "hybrid":
            assert torch.equal(assignment.as_topk()[0], torch.tensor(chosen).reshape(-1, config.k)), number


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    num_tokens=st.integers(0, 60),
    threshold=st.sampled_from([0.1, 0.5, 0.75, 1.0]),
    floor=st.integers(0, 9),
    capacity=st.integers(0, 20),
)
def test_kept_counts_lie_between_the_floor_and_the_capacity(
    seed: int, num_tokens: int, threshold: float, floor: int, capacity: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    affinity_N = torch.randn(num_tokens, generator=generator)
    expert_N = torch.randint(0, 5, (num_tokens,), generator=generator)
    keep_N = keep_best(
        affinity_N,
        affinity_N.clamp(min=0),
        expert_N,
        num_experts=5,
        threshold=threshold,
        floor=torch.tensor(floor),
        capacity=capacity,
    )
    for expert in range(5):
        own_N = expert_N == expert
        number, there = int((keep_N & own_N).sum()), int(own_N.sum())
        assert min(floor, capacity, there) <= number <= min(capacity, there)
        kept, refused = affinity_N[keep_N & own_N], affinity_N[~keep_N & own_N]
        assert not len(kept) or not len(refused) or kept.min() >= refused.max()


@pytest.mark.parametrize("k", [1, 2])
def test_hybrid_keeps_what_token_choice_and_the_affinity_capacity_keep(k: int) -> None:
    """The same rule as a capacity policy of any router, written apart; it breaks ties by choice, this by token."""
    for number in range(1, 150, 3):
        x_TD = drawn(number, 64, 12)
        hybrid: RouterOutput = LocMoEPlus(k=k, floor="none").build(12, 4).double()(x_TD)
        plain: RouterOutput = LocMoEPlus(k=k, mode="token_choice").build(12, 4).double()(x_TD)
        keep_N = AffinityThreshold(threshold=0.75, factor=1.1).admit(plain.assignment).keep_N
        assert hybrid.assignment.declined_N is not None
        assert keep_N is not None
        assert torch.equal(~hybrid.assignment.declined_N, keep_N), number


def test_the_threshold_keeps_about_six_tenths_of_random_tokens() -> None:
    """The paper's 40% fewer tokens per expert; the floor does not act, and all choices are counted."""
    layer = MoE(128, 4, 8, router=LocMoEPlus(factor=2.0))
    stats = layer(torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))).stats
    assert int(stats.assigned_E.sum()) == 4096
    assert 0.55 < 1 - int(stats.dropped_policy_E.sum()) / 4096 < 0.65
    assert int(stats.dropped_capacity_E.sum()) == 0


def test_weights_are_a_softmax_of_affinities_over_the_temperature() -> None:
    x_TD = drawn(1, 30, 12)
    routing: RouterOutput = LocMoEPlus(k=2, temperature=0.3).build(12, 4).double()(x_TD)
    expert_RK, weight_RK = routing.assignment.as_topk()
    want_RE = reference.softmax(
        x_TD @ grap_rows(12, 4).T * math.sqrt(3) / x_TD.norm(dim=1, keepdim=True).clamp(1e-9) / 0.3
    )
    torch.testing.assert_close(weight_RK, want_RE.gather(1, expert_RK), rtol=0, atol=1e-14)
    torch.testing.assert_close(routing.scores_RE, want_RE, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["token_choice", "expert_choice", "hybrid"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_task_alone_moves_the_gate(mode: Any, k: int) -> None:
    x_TD = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for gate in ("learned", "grap"):
        router = LocMoEPlus(k=k, mode=mode, gate=gate)  # type: ignore[arg-type]
        layer = MoE(
            12, 6, 4, router=router, losses=(LoadBalance(coefficient=0.0), Locality(coefficient=0.0, local=(0,)))
        ).double()
        out = layer(x_TD)
        # with fixed rows what moves is the token, through the weights
        assert torch.autograd.grad(out.assignment.weight_N.sum(), x_TD, retain_graph=True)[0].any()
        (out.y.square().sum() + total_loss(out.losses)).backward()
        if gate == "learned":
            (rows,) = layer.router.parameters()
            assert rows.grad is not None
            assert rows.grad.any(dim=1).all()


def test_every_choice_is_kept_or_dropped_in_every_mode() -> None:
    for mode in ("token_choice", "expert_choice", "hybrid"):
        for config in (LocMoEPlus(k=2, mode=mode), LocMoEPlus(k=2, mode=mode, threshold=0.3)):  # type: ignore[arg-type]
            layer = MoE(12, 6, 4, router=config)
            out = layer(torch.randn(50, 12), mask=torch.arange(50) % 5 > 0)
            kept_E = out.stats.assigned_E - out.stats.dropped_policy_E - out.stats.dropped_capacity_E
            declined_N = out.assignment.declined_N
            sent_N = torch.ones_like(out.assignment.token_N).bool() if declined_N is None else ~declined_N
            assert torch.equal(kept_E, torch.bincount(out.assignment.expert_N[sent_N], minlength=4))
            assert (out.assignment.token_N % 5 > 0).all()


def test_expert_choice_counts_a_tokens_choices_from_its_best() -> None:
    assignment = LocMoEPlus(k=2, mode="expert_choice", factor=2.0).build(12, 4)(torch.randn(40, 12)).assignment
    assert assignment.priority_N is not None
    for token in range(40):
        of_token = assignment.token_N == token
        best_first = assignment.priority_N[of_token].argsort(descending=True)
        assert assignment.choice_N[of_token][best_first].tolist() == list(range(int(of_token.sum())))


# the switch


def stats_with(kept: list[int], num_routed: int, *, by: Literal["policy", "capacity"] = "policy") -> MoEStats:
    """Every token chose both experts; what is not kept was dropped for the one reason."""
    stats = MoE(4, 2, 2)(torch.zeros(1, 4)).stats
    zero_E = torch.zeros(2, dtype=torch.int64)
    dropped_E = num_routed - torch.tensor(kept)
    return replace(
        stats,
        assigned_E=torch.full((2,), num_routed),
        dropped_policy_E=dropped_E if by == "policy" else zero_E,
        dropped_capacity_E=dropped_E if by == "capacity" else zero_E,
        num_routed=torch.tensor(num_routed),
    )


def mode_of(router: LocMoEPlusRouter) -> str:
    assignment = router(torch.randn(6, 4)).assignment
    if assignment.top_k is None:
        return "expert_choice"
    return "token_choice" if assignment.declined_N is None else "hybrid"


def built(**changes: Any) -> LocMoEPlusRouter:
    router = LocMoEPlus(**changes).build(4, 2)
    assert isinstance(router, LocMoEPlusRouter)
    return router


def test_the_switch_by_step_follows_the_optimizer_steps_and_the_checkpoint() -> None:
    router = built(switch_step=3)
    seen = []
    for _ in range(5):
        seen.append(mode_of(router))
        router.after_step(stats_with([5, 5], 10))
    assert seen == ["token_choice"] * 3 + ["hybrid"] * 2
    restored = built(switch_step=3)
    restored.load_state_dict(router.bfloat16().state_dict())
    assert mode_of(restored) == "hybrid"
    restored.reset_parameters()
    assert mode_of(restored) == "token_choice"


@pytest.mark.parametrize("by", ["policy", "capacity"])
def test_the_switch_by_kept_rows_needs_a_whole_window_below_and_is_for_good(by: Literal["policy", "capacity"]) -> None:
    router = built(before_switch="hybrid", mode="expert_choice", switch_kept=0.3, switch_window=2)
    modes = []
    for kept in ([2, 2], [5, 5], [2, 2], [3, 2], [9, 9], [9, 9]):
        router.after_step(stats_with(kept, 10, by=by))
        modes.append(mode_of(router))
    assert modes == ["hybrid"] * 3 + ["expert_choice"] * 3


def test_without_a_switch_the_mode_holds_from_the_start_and_in_evaluation_tokens_choose() -> None:
    assert mode_of(built()) == "hybrid"
    assert mode_of(built(mode="expert_choice")) == "expert_choice"
    assert mode_of(built(mode="expert_choice").eval()) == "token_choice"  # type: ignore[arg-type]
    assert mode_of(built(evaluation="mode").eval()) == "hybrid"  # type: ignore[arg-type]
