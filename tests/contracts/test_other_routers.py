"""Routers made of other things, against loops: a balanced hash, a forced load, a recording, a tree of routers."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.contracts.cases import error
from turnout import MoE, reference, total_loss
from turnout.config import from_dict, to_dict
from turnout.contracts import Router, RouterConfig
from turnout.errors import ConfigError, ShapeError
from turnout.layers import MoEConfig
from turnout.routers import DeepSeekV3, GShardTop2, Hash, Switch, TopK
from turnout.routers.forced import Forced, spread_by_share, zipf_shares
from turnout.routers.hash import HashRouter, emptiest_experts
from turnout.routers.hierarchical import Hierarchical, HierarchicalRouter
from turnout.routers.locmoe import LocMoE
from turnout.routers.locmoe_plus import LocMoEPlus
from turnout.routers.noisy_topk import NoisyTopK
from turnout.routers.quantile import Quantile
from turnout.routers.remoe import ReMoE
from turnout.routers.replay import Replay, recording_of
from turnout.routers.topk import TopKRouter
from turnout.tensors import Assignment, LossTerm, MoEStats, RouterInput, RouterOutput

LIVE = (TopK(k=2), TopK(k=3, renormalize=False, scale=2.5), TopK(k=3, activation="sigmoid"), Switch(), GShardTop2())
MORE_LIVE = (TopK(k=2, activation="sigmoid", renormalize=False), DeepSeekV3(k=3), TopK(k=2, bias=True))


def tokens(num_tokens: int, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(config: RouterConfig, num_experts: int, dim: int = 5, seed: int = 0) -> Router:
    """In float64, with weights large enough to choose."""
    torch.manual_seed(seed)
    router = config.build(dim, num_experts).double()
    assert isinstance(router, Router)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


# a hash balanced by frequency


@settings(max_examples=100)
@given(data=st.data(), num_experts=st.integers(1, 9), counts=st.lists(st.integers(1, 50), max_size=40))
def test_every_id_takes_the_emptiest_experts(data: st.DataObject, num_experts: int, counts: list[int]) -> None:
    k = data.draw(st.integers(1, num_experts))
    load = [0] * num_experts
    for count, got in zip(counts, emptiest_experts(counts, num_experts, k).tolist(), strict=True):
        want = sorted(range(num_experts), key=lambda e: (load[e], e))[:k]
        assert got == want
        for e in want:
            load[e] += count


def zipf_counts(num_ids: int) -> Tensor:
    """Natural text has about such frequencies; the last ids do not occur."""
    counts_V = (10_000 / torch.arange(1, num_ids + 1)).long()
    return torch.where(torch.arange(num_ids) < num_ids - 7, counts_V, 0)[torch.randperm(num_ids)]


def greatest_load(router: HashRouter, counts_V: Tensor) -> int:
    expert_VK = router(torch.zeros(len(counts_V), 4), torch.arange(len(counts_V))).assignment.as_topk()[0]
    count_VK = counts_V.unsqueeze(1).expand_as(expert_VK)
    return int(torch.bincount(expert_VK.flatten(), weights=count_VK.flatten().double()).max())


@pytest.mark.parametrize("k", [1, 3])
def test_a_table_is_as_even_as_the_most_frequent_id_allows_and_evener_than_a_function(k: int) -> None:
    torch.manual_seed(0)
    num_ids, num_experts = 997, 7
    counts_V = zipf_counts(num_ids)
    table, function = (Hash(k=k, vocab_size=size).build(4, num_experts) for size in (num_ids, 0))
    assert isinstance(table, HashRouter)
    assert isinstance(function, HashRouter)
    assert table.expert_VK is not None
    before_VK = table.expert_VK.clone()
    table.before_training(counts_V)
    function.before_training(counts_V)
    mean = k * int(counts_V.sum()) / num_experts
    best = max(mean, int(counts_V.max()))
    assert greatest_load(table, counts_V) <= 1.01 * best
    assert greatest_load(table, counts_V) < greatest_load(function, counts_V)
    assert torch.equal(table.expert_VK[counts_V == 0], before_VK[counts_V == 0])
    assert all(len(set(row)) == k for row in table.expert_VK.tolist())


def test_two_layers_part_the_ids_differently() -> None:
    torch.manual_seed(0)
    counts_V, together = zipf_counts(400), []
    for _ in range(2):
        router = Hash(vocab_size=400).build(4, 8)
        router.before_training(counts_V)
        expert_V = router.get_buffer("expert_VK").flatten()
        together.append(expert_V.unsqueeze(1) == expert_V)
    often_V = counts_V.argsort(descending=True)[10:60]
    first, second = (pairs[often_V][:, often_V] for pairs in together)
    # an eighth of the pairs, by chance
    assert float((first & second).sum() - 50) < 0.3 * float(first.sum() - 50)


@pytest.mark.parametrize("vocab_size", [0, 300])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_an_id_goes_to_the_same_experts_whatever_its_dtype(dtype: torch.dtype, vocab_size: int) -> None:
    torch.manual_seed(0)
    layer = MoE(4, 8, 16, router=Hash(k=2, vocab_size=vocab_size), losses=())
    ids_T = torch.arange(250)
    x_TD = torch.randn(250, 4)
    wanted, got = (layer(x_TD, token_ids=ids) for ids in (ids_T, ids_T.to(dtype)))
    assert torch.equal(got.assignment.expert_N, wanted.assignment.expert_N)
    assert torch.equal(got.y, wanted.y)


def test_a_table_comes_back_from_a_checkpoint_also_into_a_model_from_the_meta_device() -> None:
    config = Hash(k=2, vocab_size=30)
    router = config.build(4, 5)
    router.before_training(torch.arange(30))
    with torch.device("meta"):
        placed = config.build(4, 5)
    placed = placed.to_empty(device="cpu")
    assert isinstance(placed, HashRouter)
    placed.reset_parameters()
    assert placed.expert_VK is not None
    assert 0 <= int(placed.expert_VK.min()) <= int(placed.expert_VK.max()) < 5
    placed.load_state_dict(router.bfloat16().state_dict())
    ids_T = torch.randint(0, 30, (50,))
    want, got = (r(torch.zeros(50, 4), ids_T).assignment for r in (router, placed))
    assert torch.equal(got.expert_N, want.expert_N)
    assert set(Hash().build(4, 5).state_dict()) == {"coefficients"}


# a forced load


@settings(max_examples=100)
@given(data=st.data(), num_experts=st.integers(1, 13), num_tokens=st.integers(0, 40))
def test_forced_experts_get_equally_many_real_tokens(data: st.DataObject, num_experts: int, num_tokens: int) -> None:
    k = data.draw(st.integers(1, num_experts))
    mask_T = torch.rand(num_tokens, generator=torch.Generator().manual_seed(num_tokens)) < 0.7
    assignment = Forced(k=k, scale=2.0).build(3, num_experts)(torch.zeros(num_tokens, 3), None, mask_T).assignment
    expert_RK, weight_RK = assignment.as_topk()
    assert int(assignment.counts_E.max() - assignment.counts_E.min()) <= 1
    assert all(len(set(row)) == k for row in expert_RK.tolist())
    assert torch.equal(weight_RK, torch.full_like(weight_RK, 2.0 / k))
    assert torch.equal(assignment.token_N, mask_T.nonzero().flatten().repeat_interleave(k))


def test_the_steepest_load_is_all_tokens_of_the_first_experts() -> None:
    assert zipf_shares(5, 2, 1e9).tolist() == [1, 1, 0, 0, 0]


@settings(max_examples=100)
@given(data=st.data(), num_experts=st.integers(1, 13), skew=st.floats(0.01, 5))
def test_a_skewed_load_follows_zipf_up_to_every_token(data: st.DataObject, num_experts: int, skew: float) -> None:
    k, num_tokens = data.draw(st.integers(1, num_experts)), 1000
    share_E = zipf_shares(num_experts, k, skew)
    assert abs(float(share_E.sum()) - k) < 1e-9
    partial_E = share_E[share_E < 1]
    zipf_E = torch.arange(1, num_experts + 1, dtype=torch.float64).pow(-skew)[share_E < 1]
    assert error(partial_E / partial_E.sum(), zipf_E / zipf_E.sum()) < 1e-12
    expert_RK = spread_by_share(share_E, num_tokens, k)
    counts_E = torch.bincount(expert_RK.flatten(), minlength=num_experts)
    # the golden ratio's discrepancy, with room
    assert float((counts_E - num_tokens * share_E).abs().max()) < 12
    assert all(len(set(row)) == k for row in expert_RK.tolist())


def test_a_skewed_router_is_the_same_in_every_call() -> None:
    router = Forced(k=2, skew=1.0).build(3, 5)
    first, again = (router(torch.randn(30, 3)).assignment for _ in range(2))
    assert torch.equal(first.expert_N, again.expert_N)
    assert first.counts_E.tolist() == sorted(first.counts_E.tolist(), reverse=True)
    assert len(router(torch.zeros(0, 3)).assignment.token_N) == 0


# a recording


@pytest.mark.parametrize("config", [*LIVE, *MORE_LIVE])
def test_replaying_what_the_live_router_chose_changes_nothing_not_even_gradients(config: RouterConfig) -> None:
    live = built(config, 7)
    x_TD, mask_T = tokens(23), torch.arange(23) % 3 != 0
    grads = []
    recording = live(x_TD, None, mask_T, torch.Generator().manual_seed(1)).assignment
    for router in (live, Replay(live, recording)):
        router.zero_grad()
        x_grad_TD = x_TD.clone().requires_grad_()
        assignment = router(x_grad_TD, None, mask_T, torch.Generator().manual_seed(1)).assignment
        assert torch.equal(assignment.expert_N, recording.expert_N)
        assert (assignment.declined_N is None) == (recording.declined_N is None)
        assert error(assignment.weight_N, recording.weight_N) < 1e-14
        (assignment.weight_N * torch.arange(len(assignment.weight_N))).sum().backward()
        grads.append([x_grad_TD.grad, *(p.grad for p in live.parameters())])
    for want, got in zip(*grads, strict=True):
        assert got is not None
        assert want is not None
        assert error(got, want) < 1e-13


@pytest.mark.parametrize("config", LIVE)
def test_live_weights_of_other_experts_are_those_of_the_loops(config: RouterConfig) -> None:
    live, x_TD = built(config, 7), tokens(9, seed=3)
    expert_TK = torch.stack([torch.randperm(7)[:3] for _ in range(9)])
    routing = Replay(live, recording_of(expert_TK, num_experts=7))(x_TD)
    convention = config if isinstance(config, TopK) else TopK(renormalize=isinstance(config, GShardTop2), k=2)
    logits_TE = routing.logits_RE
    gate_TE = reference.topk_gates(
        logits_TE,
        expert_TK,
        activation=convention.activation,
        renormalize=convention.renormalize,
        scale=convention.scale,
    )
    assert torch.equal(routing.assignment.as_topk()[0], expert_TK)
    assert error(routing.assignment.as_topk()[1], gate_TE.gather(1, expert_TK)) < 1e-14


def test_a_recording_may_give_tokens_any_number_of_experts() -> None:
    live, x_TD = built(TopK(k=2, scale=2.0), 6), tokens(4).requires_grad_()
    token_N, expert_N = torch.tensor([3, 0, 0, 0, 2]), torch.tensor([5, 1, 4, 2, 0])
    recording = Assignment(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=torch.tensor([0.5, 0.1, 0.2, 0.3, 0.7]).requires_grad_(),  # as of a rollout with a graph
        choice_N=torch.tensor([0, 0, 1, 2, 0]),
        num_tokens=4,
        num_experts=6,
    )
    routing = Replay(live, recording)(x_TD)
    weight_N = routing.assignment.weight_N
    weight_N.sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()
    want = routing.logits_RE[0, [1, 4, 2]].softmax(dim=0) * 2
    assert error(weight_N, torch.stack([want.new_tensor(2.0), *want, want.new_tensor(2.0)])) < 1e-14
    played = Replay(live, recording, weights="recorded")(x_TD).assignment
    assert error(played.weight_N, recording.weight_N.double()) < 1e-14
    assert not played.weight_N.requires_grad


def test_extreme_live_logits_give_finite_weights_and_gradients_at_any_recorded_expert() -> None:
    for activation in ("softmax", "sigmoid"):
        for logit in (-3e4, -200.0, 0.0, 200.0, 3e4):
            live = TopK(k=2, activation=activation).build(1, 4)
            with torch.no_grad():
                live.get_parameter("score.weight_ED").copy_(torch.tensor([[logit], [0.0], [0.0], [-logit]]))
            replay = Replay(live, recording_of(torch.tensor([[3, 1], [0, 2]]), num_experts=4))
            weight_RK = replay(torch.ones(2, 1)).assignment.as_topk()[1]
            weight_RK.square().sum().backward()
            grad = live.get_parameter("score.weight_ED").grad
            assert grad is not None
            assert grad.isfinite().all()
            assert error(weight_RK.sum(dim=1).double(), torch.ones(2, dtype=torch.float64)) < 1e-6


def test_a_layer_replays_the_rollout_of_its_twin_recorded_without_gradients() -> None:
    torch.manual_seed(0)
    layer = MoE(8, 6, 5).double()
    x, mask = torch.randn(3, 7, 8, dtype=torch.float64), torch.rand(3, 7) > 0.3
    with torch.inference_mode():
        rollout = layer(x, mask=mask)
    live = layer.router
    assert isinstance(live, Router)
    trained = MoE(8, 6, 5, router=Replay(live, rollout.assignment)).double()
    trained.experts.load_state_dict(layer.experts.state_dict())
    out = trained(x, mask=mask)
    assert error(out.y, rollout.y.clone()) < 1e-14
    out.y.square().sum().backward()
    assert live.get_parameter("score.weight_ED").grad is not None


def test_a_recording_that_does_not_fit_is_refused() -> None:
    live, x_TD = built(TopK(k=2), 4), tokens(6)
    mask_T = torch.tensor([True, True, False, True, True, True])
    whole, masked = live(x_TD).assignment, live(x_TD, None, mask_T).assignment
    with pytest.raises(ShapeError, match=r"recording has 6 tokens; this call has 5"):
        Replay(live, whole)(x_TD[:5])
    for recording, mask in ((whole, mask_T), (masked, None), (masked, mask_T.flip(0))):
        with pytest.raises(ShapeError, match=r"made with another mask"):
            Replay(live, recording)(x_TD, None, mask)
    with pytest.raises(ConfigError, match=r"recording has num_experts=4; the live router has 3"):
        Replay(built(TopK(k=2), 3), whole)
    with pytest.raises(ConfigError, match=r"weights a HashRouter gives .* topk, switch, .* set weights='recorded'"):
        Replay(built(Hash(), 4), whole)
    for rows in ([[0, 0]], [[0, 4]], [[-1, 0]]):
        with pytest.raises(ShapeError, match=r"recorded token needs 2 different experts from 0 to 3"):
            recording_of(torch.tensor(rows), num_experts=4)


# a tree


def two_levels(router: HierarchicalRouter, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and scores of a tree of two softmax top-k levels by loops over tokens, groups and experts: (T, E)."""
    config, n = router.config, router.group_size
    gate_TE, score_TE = (torch.zeros(len(x_TD), router.num_experts, dtype=torch.float64) for _ in range(2))
    for t, x_D in enumerate(x_TD):
        outer_gates, outer_scores, _ = level(router.outer, config.outer, x_D)
        for g in range(config.groups):
            own = slice(g * n, g * n + n)
            if outer_gates[g] == 0:
                score_TE[t, own] = outer_scores[g] / n
                continue
            gates, scores, _ = level(router.inner[g], config.inner, x_D)
            gate_TE[t, own], score_TE[t, own] = outer_gates[g] * gates, outer_scores[g] * scores
    return gate_TE, score_TE


def level(router: torch.nn.Module, config: RouterConfig, x_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, scores and chosen experts, best first, of one token at one level."""
    logits_1E = router.get_parameter("score.weight_ED") @ x_D.unsqueeze(1)
    logits_1E = logits_1E.T
    expert_1K = reference.best_experts(logits_1E, config.choices)
    renormalize = isinstance(config, GShardTop2) or (isinstance(config, TopK) and config.renormalize)
    gates = reference.topk_gates(logits_1E, expert_1K, renormalize=renormalize)
    return gates[0], reference.softmax(logits_1E)[0], expert_1K[0]


def gates_of(routing: RouterOutput) -> Tensor:
    a = routing.assignment
    sent_N = torch.ones_like(a.weight_N) if a.declined_N is None else (~a.declined_N).double()
    return torch.zeros(a.num_tokens, a.num_experts, dtype=torch.float64).index_put(
        (a.token_N, a.expert_N), a.weight_N * sent_N, accumulate=True
    )


TREES = [
    (2, Switch(), TopK(k=2), 8),
    (3, TopK(k=2), Switch(), 15),
    (4, TopK(k=3), TopK(k=2, renormalize=False), 12),
    (3, TopK(k=3, renormalize=False), GShardTop2(second_expert="all"), 9),
]


@pytest.mark.parametrize(("groups", "outer", "inner", "num_experts"), TREES)
@pytest.mark.parametrize("num_tokens", [0, 1, 19])
def test_a_tree_of_two_levels_is_the_product_of_their_gates(
    groups: int, outer: RouterConfig, inner: RouterConfig, num_experts: int, num_tokens: int
) -> None:
    router = built(Hierarchical(groups=groups, outer=outer, inner=inner), num_experts)
    assert isinstance(router, HierarchicalRouter)
    x_TD = tokens(num_tokens)
    grads = []
    for by_loops in (False, True):
        x = x_TD.clone().requires_grad_()
        router.zero_grad()
        if by_loops:
            gate_TE, score_TE = two_levels(router, x)
        else:
            routing = router(x)
            gate_TE, score_TE = gates_of(routing), routing.scores_RE
        values = [gate_TE.detach(), score_TE.detach()]
        weighing = tokens(num_tokens, num_experts, seed=5)
        loss = (gate_TE * weighing).sum() + (score_TE * weighing.square()).sum()
        if loss.requires_grad:
            loss.backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in router.parameters()]
        grads.append([*values, torch.zeros_like(x) if x.grad is None else x.grad, *own])
    for got, want in zip(*grads, strict=True):
        assert error(got, want) < 1e-13


def test_choices_stand_in_the_order_of_groups_then_of_experts_and_padding_takes_none() -> None:
    config = Hierarchical(groups=3, outer=TopK(k=2), inner=TopK(k=2))
    router = built(config, 12)
    assert isinstance(router, HierarchicalRouter)
    x_TD, mask_T = tokens(17), torch.arange(17) % 4 != 1
    x_TD[~mask_T] = torch.nan
    assignment = router(x_TD, None, mask_T).assignment
    assert assignment.top_k == config.choices == 4
    assert torch.equal(assignment.token_N, mask_T.nonzero().flatten().repeat_interleave(4))
    assert torch.equal(assignment.choice_N, torch.arange(4).repeat(int(mask_T.sum())))
    for x_D, expert_K in zip(x_TD[mask_T], assignment.as_topk()[0].tolist(), strict=True):
        groups = level(router.outer, config.outer, x_D)[2].tolist()
        want = [g * 4 + e for g in groups for e in level(router.inner[g], config.inner, x_D)[2].tolist()]
        assert expert_K == want


def test_a_tree_may_be_deeper_and_all_of_it_chosen_it_is_a_product_of_softmaxes() -> None:
    leaf = TopK(k=2, renormalize=False)
    config = Hierarchical(groups=2, outer=leaf, inner=Hierarchical(groups=2, outer=leaf, inner=leaf))
    assert config.choices == 8
    router = built(config, 8)
    x_TD = tokens(11)
    routing = router(x_TD)
    shares = {}
    for name, module in router.named_modules():
        if name.endswith("score"):
            shares[name] = (x_TD @ module.get_parameter("weight_ED").T).softmax(dim=1)
    for e, (a, b, c) in enumerate(product(range(2), repeat=3)):
        share_T = (
            shares["outer.score"][:, a]
            * shares[f"inner.{a}.outer.score"][:, b]
            * shares[f"inner.{a}.inner.{b}.score"][:, c]
        )
        assert error(routing.scores_RE[:, e], share_T) < 1e-14
    assert error(gates_of(routing), routing.scores_RE) < 1e-14


def test_first_choices_alone_of_later_groups_are_moe2d() -> None:
    gshard = GShardTop2(second_expert="all")
    config = Hierarchical(groups=3, outer=gshard, inner=gshard, later_groups="first")
    routing = built(config, 12)(tokens(13))
    declined_N = routing.assignment.declined_N
    assert declined_N is not None
    assert declined_N.view(-1, 4).tolist() == [[False, False, False, True]] * 13
    # in Mesh TensorFlow a token of importance 0.5 has one choice in its later group, whose weight there is 1
    everywhere = built(replace(config, later_groups="all"), 12)(tokens(13)).assignment.weight_N.view(-1, 4)
    weight_T4 = routing.assignment.weight_N.view(-1, 4)
    assert torch.equal(weight_T4[:, :2], everywhere[:, :2])
    assert error(weight_T4[:, 2], everywhere[:, 2:].sum(dim=1)) < 1e-14
    assert error(weight_T4[:, :3].sum(dim=1), torch.ones(13, dtype=torch.float64)) < 1e-14


def test_a_choice_is_declined_if_the_group_or_the_expert_is() -> None:
    gshard = GShardTop2(second_expert="none")
    for outer, inner, want in ((gshard, TopK(k=2), [0, 0, 1, 1]), (TopK(k=2), gshard, [0, 1, 0, 1])):
        routing = built(Hierarchical(groups=3, outer=outer, inner=inner), 9)(tokens(7))
        declined_N = routing.assignment.declined_N
        assert declined_N is not None
        assert declined_N.view(-1, 4).int().tolist() == [want] * 7


def test_a_tree_may_hold_routers_by_token_id_and_of_varying_numbers() -> None:
    x_TD, ids_T = tokens(29, dim=32), torch.randint(0, 50, (29,))
    # alone these learn from what a whole layer did
    fitting = [(name, row) for name, row in RouterConfig.TABLE.items() if not row().needs_whole_layer]
    assert len(RouterConfig.TABLE) - len(fitting) == 3
    for name, row in fitting:
        for outer in (Hash(), TopK(k=2)):
            router = built(Hierarchical(groups=3, outer=outer, inner=row()), 3 * 16, dim=32)
            routing = router(x_TD, ids_T, None, torch.Generator().manual_seed(0))
            a = routing.assignment
            assert error(routing.scores_RE.sum(dim=1), torch.ones(29, dtype=torch.float64)) < 1e-13, name
            assert a.weight_N.isfinite().all(), name
            assert len((a.token_N * 48 + a.expert_N).unique()) == len(a.token_N), name
            assert len((a.token_N * 48 + a.choice_N).unique()) == len(a.token_N), name
            assert bool((a.token_N.diff() >= 0).all()), name
            if a.top_k is not None:
                assert len(a.token_N) == 29 * a.top_k, name
            assert all(term.value.isfinite() for term in routing.losses), name


@pytest.mark.parametrize(
    "part",
    [Quantile(), ReMoE(), LocMoE(), LocMoEPlus(switch_kept=0.1, before_switch="hybrid"), Hierarchical(inner=ReMoE())],
    ids=str,
)
def test_a_router_that_learns_from_its_whole_layer_is_refused_at_both_levels_of_a_tree(part: RouterConfig) -> None:
    for tree in (Hierarchical(outer=part), Hierarchical(inner=part)):
        with pytest.raises(ConfigError, match=r"learns from what a step did with all tokens of its layer \("):
            tree.build(32, 8 if tree.inner is part else 4)
    for quiet in (LocMoE(floor="none"), LocMoEPlus()):
        Hierarchical(inner=quiet).build(32, 8)


def test_the_smooth_load_is_the_groups_load_times_the_experts_share_of_it() -> None:
    noisy = NoisyTopK(k=2)
    router = built(Hierarchical(groups=3, outer=noisy, inner=noisy), 15).train()
    assert isinstance(router, HierarchicalRouter)
    x_TD = tokens(40)
    load_E = router(x_TD, None, None, torch.Generator().manual_seed(2)).smooth_load_E
    assert load_E is not None
    generator = torch.Generator().manual_seed(2)
    outer = router.outer(x_TD, None, None, generator)
    for g in range(3):
        mine_T = outer.assignment.token_N[outer.assignment.expert_N == g]
        inner = router.inner[g](x_TD[mine_T], None, None, generator)
        want = outer.smooth_load_E[g] * inner.smooth_load_E / len(mine_T)
        assert error(load_E[g * 5 : g * 5 + 5], want) < 1e-14


@dataclass(frozen=True, kw_only=True)
class Priced(RouterConfig):
    """A router of a user's own, with a term of its own: a mean over its tokens."""

    @property
    def choices(self) -> int:
        return 2

    def build(self, dim: int, num_experts: int) -> Router:
        return _PricedRouter(dim, num_experts, TopK(k=2))


class _PricedRouter(TopKRouter):
    def route(self, tokens: RouterInput) -> RouterOutput:
        routing = super().route(tokens)
        value = routing.logits_RE.square().sum() / max(len(tokens.token_R), 1)
        return replace(routing, losses=(LossTerm(name="price", value=value, coefficient=1.0, scope="micro_batch"),))


def test_terms_of_the_inner_routers_add_up_to_a_mean_over_all_tokens() -> None:
    router = built(Hierarchical(groups=3, outer=Switch(), inner=Priced()), 12)
    assert isinstance(router, HierarchicalRouter)
    x_TD, routing = tokens(40), router(tokens(40))
    group_T = router.outer(x_TD).assignment.expert_N
    assert len(set(group_T.bincount(minlength=3).tolist())) > 1
    prices = [router.inner[g].score(x_TD[t]).square().sum() for t, g in enumerate(group_T.tolist())]  # type: ignore[union-attr, operator]
    assert error(total_loss(routing.losses), torch.stack(prices).mean()) < 1e-14


def test_biases_of_every_level_learn_from_their_own_load() -> None:
    v3 = DeepSeekV3(k=2, bias_step=0.5)
    router = built(Hierarchical(groups=3, outer=v3, inner=v3), 12)
    assert isinstance(router, HierarchicalRouter)
    assigned_E = torch.tensor([4, 4, 4, 4, 9, 0, 0, 1, 0, 0, 0, 2])
    zero = torch.zeros((), dtype=torch.int64)
    none_E = torch.zeros_like(assigned_E)
    stats = MoEStats(
        assigned_E=assigned_E,
        dropped_capacity_E=none_E,
        dropped_policy_E=none_E,
        num_routed=zero,
        num_padding=zero,
        entropy_sum=zero.double(),
        margin_sum=zero.double(),
    )
    router.after_step(stats)
    assert router.outer.get_buffer("bias_E").tolist() == [-0.5, -0.5, 0.5]
    assert router.inner[0].get_buffer("bias_E").tolist() == [0.0] * 4
    assert router.inner[1].get_buffer("bias_E").tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert router.inner[2].get_buffer("bias_E").tolist() == [0.5, 0.5, 0.5, -0.5]


def test_a_tree_is_written_in_a_recipe_and_read_back() -> None:
    router = {
        "name": "hierarchical",
        "groups": 2,
        "outer": "switch",
        "inner": {"name": "hierarchical", "groups": 4, "outer": {"name": "topk", "k": 2}, "inner": {"name": "gshard"}},
    }
    config = from_dict(MoEConfig, {"num_experts": 16, "router": router})
    inner = Hierarchical(groups=4, outer=TopK(k=2), inner=GShardTop2())
    assert config.router == Hierarchical(groups=2, outer=Switch(), inner=inner)
    assert from_dict(MoEConfig, to_dict(config)) == config
    assert config.router.choices == 4


def test_a_tree_trains_in_a_layer_from_the_meta_device() -> None:
    config = Hierarchical(groups=2, outer=Switch(), inner=TopK(k=2))
    with torch.device("meta"):
        layer = MoE(8, 6, 8, router=config)
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    x = torch.randn(4, 9, 8)
    out = layer(x, mask=torch.rand(4, 9) > 0.3)
    (out.y.square().sum() + sum(term.value for term in out.losses)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_what_no_tree_can_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.groups=1 must be at least 2; for one group use its router alone"):
        Hierarchical(groups=1)
    for num_experts in (10, 4):
        with pytest.raises(ConfigError, match=rf"groups=4 must divide num_experts={num_experts} into groups of at l"):
            Hierarchical(groups=4).build(4, num_experts)
    with pytest.raises(ConfigError, match=r"the inner router chooses among 2: router\.k=3 is more than num_experts=2"):
        Hierarchical(groups=4, inner=TopK(k=3)).build(4, 8)
    assert replace(Hierarchical(), groups=4).build(4, 8).num_experts == 8
