"""Laws of the auxiliary losses, for every row of the table and for each of ours."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.contracts.cases import Case, draw, draw_case, error, loss_of, simple_case
from tests.contracts.test_dispatch import any_assignment
from turnout import MoE, reference
from turnout.contracts import Loss, Router, RouterConfig
from turnout.dispatch import Dropless, FixedCapacity
from turnout.errors import ConfigError
from turnout.losses import (
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    Importance,
    LoadBalance,
    LoadCV,
    RouterZ,
    cv_squared,
    load_balance_from_counts,
    load_balance_loss,
    router_z_loss,
    routing_entropy,
)
from turnout.routers import Forced, GShardTop2, Hash, Hierarchical, TopK
from turnout.routers.noisy_topk import NoisyTopK
from turnout.tensors import LossTerm, RouterOutput, Scope, total_loss

ROWS = Loss.TABLE.names()


def with_loss(case: Case, loss: Loss) -> Case:
    """The case with this loss alone, and with a router that can form it."""
    if isinstance(loss, LoadCV):
        experts = max(case.num_experts, 2)
        case = replace(case, router=NoisyTopK(k=2), num_experts=experts, training=True, content="normal")
    elif not case.router.scores_have_gradient:
        case = replace(case, router=TopK(k=1, renormalize=False))
    # experts for every device; more than are near
    if case.num_experts % getattr(loss, "groups", 1) or case.num_experts <= len(getattr(loss, "local", ())):
        case = replace(case, router=TopK(k=2), num_experts=6)
    return replace(case, losses=(loss,))


def any_routing(seed: int, num_tokens: int, num_experts: int, is_topk: bool = True) -> RouterOutput:
    """Random scores and an assignment that has nothing to do with them; each token may be followed by padding."""
    generator = torch.Generator().manual_seed(seed)
    logits_RE = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    assignment = any_assignment(seed, num_tokens, num_experts, is_topk, False)
    return RouterOutput(
        assignment=replace(assignment, token_N=2 * assignment.token_N, num_tokens=2 * num_tokens),
        logits_RE=logits_RE,
        scores_RE=logits_RE.softmax(dim=1),
        token_R=2 * torch.arange(num_tokens),
    )


def term_of(loss: Loss, routing: RouterOutput, sequence_length: int = 1) -> Tensor:
    return loss.term(routing, Dropless().admit(routing.assignment), sequence_length=sequence_length).value


routings = st.builds(any_routing, st.integers(0, 10**6), st.integers(0, 12), st.sampled_from([1, 2, 6]), st.booleans())


@pytest.mark.parametrize("row", ROWS)
def test_a_term_carries_its_name_and_coefficient_and_is_one_finite_number(row: str) -> None:
    part = loss_of(row, 6, coefficient=0.3)
    for seed in range(20):
        layer, inputs = draw(with_loss(draw_case(seed), part))
        *_, term = layer(inputs.x, mask=inputs.mask, token_ids=inputs.token_ids).losses
        assert (term.name, term.coefficient) == (row, 0.3)
        assert term.value.shape == ()
        assert term.value.isfinite()


TREES = [Hierarchical(groups=2, outer=o, inner=i) for o in (Hash(), TopK()) for i in (Forced(), TopK())]


@pytest.mark.parametrize("config", [*(row() for _, row in RouterConfig.TABLE.items()), *TREES], ids=repr)
def test_losses_are_refused_where_no_gradient_would_reach_anything_and_nowhere_else(config: RouterConfig) -> None:
    """The tables know what autograd finds: on fixed scores a loss is a constant that a banner would call live."""
    router = config.build(12, 12)
    assert isinstance(router, Router)
    routing = router(torch.randn(9, 12).requires_grad_(), torch.arange(9), None, torch.Generator())
    assert config.scores_have_gradient == routing.scores_RE.requires_grad == routing.logits_RE.requires_grad
    for row in ROWS:
        part = loss_of(row, 12)
        if config.scores_have_gradient and (row != "load_cv" or config.gives_smooth_load):
            assert MoE(12, 4, 12, router=config, losses=(part,)).config.losses == (part,)
        else:
            with pytest.raises(ConfigError, match=r"the loss (load_cv needs|\w+ would be a constant: .*losses=\(\))"):
                MoE(12, 4, 12, router=config, losses=(part,))


def test_a_router_of_ones_own_takes_any_loss_because_nothing_says_what_it_learns() -> None:
    layer = MoE(12, 4, 6, router=Hash(k=2).build(12, 6), losses=(LoadBalance(), RouterZ(), Entropy()))
    assert len(layer(torch.randn(5, 12), token_ids=torch.arange(5)).losses) == 3


@pytest.mark.parametrize("row", ROWS)
def test_a_term_does_not_see_which_choices_were_dropped(row: str) -> None:
    """The papers count the choices made; a loss that saw drops would change with the capacity."""
    part = loss_of(row, 6, coefficient=0.3)
    case = with_loss(simple_case(), part)
    layer, inputs = draw(case)
    tight, _ = draw(replace(case, capacity=FixedCapacity(factor=0.25)))
    values = [each(inputs.x, generator=torch.Generator().manual_seed(0)).losses[-1].value for each in (layer, tight)]
    assert torch.equal(*values)


@pytest.mark.parametrize("count", ["all", "first"])
@pytest.mark.parametrize("padding", [None, 0.3])
def test_sequence_scope_is_the_mean_of_the_sequences_alone(count: str, padding: float | None) -> None:
    """Each sequence weighed by its share of the real tokens, which is the plain mean when none is padding."""
    loss = LoadBalance(scope="sequence", count="first" if count == "first" else "all")
    for router in (TopK(k=2), TopK(k=3, activation="sigmoid"), GShardTop2(second_expert="all")):
        layer, inputs = draw(simple_case(shape=(4, 9), losses=(loss,), router=router, padding=padding))
        alone = MoE(12, 10, 5, router=router, losses=(replace(loss, scope="micro_batch"),), bias=True).double()
        alone.load_state_dict(layer.state_dict())
        mask = torch.ones(4, 9, dtype=torch.bool) if inputs.mask is None else inputs.mask
        (term,) = layer(inputs.x, mask=inputs.mask).losses
        values = torch.stack([alone(x, mask=m).losses[0].value for x, m in zip(inputs.x, mask, strict=True)])
        share = mask.double().sum(dim=1) / mask.sum()
        assert error(term.value, (share * values).sum()) < 1e-14
        if padding is None:
            assert error(term.value, values.mean()) < 1e-14


@pytest.mark.parametrize("scope", ["micro_batch", "global"])
def test_scopes_agree_on_one_process(scope: Scope) -> None:
    layer, inputs = draw(simple_case(losses=(LoadBalance(scope=scope),)))
    plain, _ = draw(simple_case(losses=(LoadBalance(),)))
    assert torch.equal(layer(inputs.x).losses[0].value, plain(inputs.x).losses[0].value)


def test_collapsed_routing_gives_a_balance_loss_of_the_number_of_experts() -> None:
    scores_RE = torch.zeros(7, 5).index_fill(1, torch.tensor([3]), 1.0)
    assert load_balance_loss(scores_RE, torch.tensor([0, 0, 0, 7, 0])).item() == 5.0


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), num_tokens=st.integers(0, 20), num_experts=st.integers(1, 9), k=st.integers(1, 4))
def test_balance_and_z_loss_equal_the_papers(seed: int, num_tokens: int, num_experts: int, k: int) -> None:
    logits_RE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).double()
    expert_RK = reference.best_experts(logits_RE, min(k, num_experts))
    scores_RE = logits_RE.softmax(dim=1)
    counts_E = torch.bincount(expert_RK.flatten(), minlength=num_experts)
    assert error(load_balance_loss(scores_RE, counts_E), reference.load_balance(scores_RE, expert_RK)) < 1e-14
    assert error(router_z_loss(logits_RE), reference.z_loss(logits_RE)) < 1e-13


def test_losses_of_no_tokens_are_zero() -> None:
    for x in (torch.zeros(0, 12), torch.zeros(2, 0, 12), torch.zeros(0, 3, 12)):
        layer = MoE(12, 4, 3, router=NoisyTopK(k=2), losses=tuple(loss_of(row, 3) for row in ROWS))
        assert all(term.value.item() == 0 for term in layer(x).losses)


def test_the_total_adds_coefficient_times_value() -> None:
    values: list[Tensor] = [torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)]
    terms = tuple(
        LossTerm(name=f"{i}", value=value, coefficient=0.5 + i, scope="micro_batch") for i, value in enumerate(values)
    )
    assert total_loss(terms).item() == 0.5 * 2 + 1.5 * 3
    assert total_loss(terms).dtype == torch.float64
    assert total_loss(()).item() == 0


def test_the_balance_gradient_goes_through_the_scores_alone() -> None:
    scores_RE = torch.rand(6, 4, dtype=torch.float64).softmax(dim=1).requires_grad_()
    counts_E = torch.tensor([3.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    load_balance_loss(scores_RE, counts_E).backward()
    assert scores_RE.grad is not None
    assert error(scores_RE.grad, (4 / 6 * counts_E / 6).expand(6, 4)) < 1e-15


@pytest.mark.parametrize("padding", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("loss", [LoadBalance(scope="sequence"), RouterZ(), Entropy()], ids=lambda x: type(x).__name__)
def test_parts_weighed_by_their_tokens_give_the_gradient_of_the_whole_batch(
    loss: Loss, ranks: int, accumulation: int, padding: float
) -> None:
    """Whatever is a mean over tokens keeps its coefficient when a batch is split over ranks and micro-batches."""
    split = Split(ranks * accumulation, padding)
    parts = [routing.token_R.numel() / split.num_routed * term_of(loss, routing, 8) for routing in split.parts()]
    assert split.gradient_error(torch.stack(parts).sum(), term_of(loss, split.whole, 8)) < 1e-12


@pytest.mark.parametrize("padding", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_balance_keeps_its_coefficient_over_ranks_accumulation_and_padding(
    ranks: int, accumulation: int, padding: float
) -> None:
    """With the whole step's counts, either way of adding the parts up gives the gradient of the whole batch."""
    split = Split(ranks * accumulation, padding)
    counts_E = split.whole.assignment.counts_E
    whole = term_of(LoadBalance(scope="global"), split.whole)
    scores = [part.scores_RE for part in split.parts()]
    added = sum(load_balance_from_counts(s_RE, counts_E, num_tokens=split.num_routed) for s_RE in scores)
    weighed = sum(len(s_RE) / split.num_routed * load_balance_loss(s_RE, counts_E) for s_RE in scores)
    for value in (added, weighed):
        assert isinstance(value, Tensor)
        assert split.gradient_error(value, whole) < 1e-12


def test_parts_weighed_alike_do_not_where_padding_is_uneven() -> None:
    """Why the train step must not take the plain mean over micro-batches."""
    split = Split(4, 0.5)
    parts = torch.stack([term_of(RouterZ(), routing) for routing in split.parts()])
    assert split.gradient_error(parts.mean(), term_of(RouterZ(), split.whole)) > 1e-3


class Split:
    """16 sequences of 8 tokens through one router, whole and in equal parts; the later ones have more padding."""

    def __init__(self, num_parts: int, padding: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.router = TopK(k=2).build(5, 6).double()
        with torch.no_grad():
            self.router.get_parameter("score.weight_ED").normal_(generator=generator)
        self.x_BSD = torch.randn(16, 8, 5, generator=generator, dtype=torch.float64)
        chance_B1 = torch.linspace(0, 2 * padding, 16).unsqueeze(1)
        self.mask_BS = torch.rand(16, 8, generator=generator) >= chance_B1
        self.num_parts = num_parts
        self.num_routed = int(self.mask_BS.sum())
        self.whole = self._route(slice(None))

    def parts(self) -> Iterator[RouterOutput]:
        size = 16 // self.num_parts
        for start in range(0, 16, size):
            yield self._route(slice(start, start + size))

    def gradient_error(self, value: Tensor, want: Tensor) -> float:
        """The larger of the errors of the value and of its gradient in the router's weights."""
        weights = list(self.router.parameters())
        (got_grad,), (want_grad,) = (torch.autograd.grad(v, weights, retain_graph=True) for v in (value, want))
        assert want_grad.abs().max() > 1e-4, "nothing to compare"
        return max(error(value, want), error(got_grad / want_grad.abs().max(), want_grad / want_grad.abs().max()))

    def _route(self, part: slice) -> RouterOutput:
        return self.router(self.x_BSD[part].flatten(0, 1), None, self.mask_BS[part].flatten())


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), num_experts=st.integers(1, 9))
def test_cv_squared_is_variance_over_squared_mean(seed: int, num_experts: int) -> None:
    load_E = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = load_E.tolist()
    mean = sum(values) / num_experts
    variance = sum((value - mean) ** 2 for value in values) / num_experts
    assert abs(cv_squared(load_E).item() - variance / mean**2) < 1e-12
    # a load twice as large is no more uneven
    assert abs(cv_squared(2 * load_E).item() - cv_squared(load_E).item()) < 1e-12


@pytest.mark.parametrize("load", [[0.0], [3.0], [0.0, 0.0, 0.0], [1e-30, 0.0], [1e18, 0.0], [2.0, 2.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cv_squared_and_its_gradient_are_finite_for_one_expert_and_for_no_load(
    load: list[float], dtype: torch.dtype
) -> None:
    load_E = torch.tensor(load, dtype=dtype, requires_grad=True)
    value = cv_squared(load_E)
    value.backward()
    assert value.isfinite()
    assert load_E.grad is not None
    assert load_E.grad.isfinite().all()
    if len(set(load)) == 1:
        assert value.item() == 0
        assert not load_E.grad.any()


@settings(max_examples=100)
@given(routing=routings)
def test_importance_is_the_cv_of_summed_scores_or_of_the_weights_of_the_choices(routing: RouterOutput) -> None:
    assignment = routing.assignment
    scores = [float(routing.scores_RE[:, e].sum()) for e in range(assignment.num_experts)]
    weights = [float(assignment.weight_N[assignment.expert_N == e].sum()) for e in range(assignment.num_experts)]
    for of, mass in (("scores", scores), ("weights", weights)):
        got = term_of(Importance(of="scores" if of == "scores" else "weights"), routing)
        assert error(got, cv_squared(torch.tensor(mass, dtype=torch.float64))) < 1e-12


def test_the_halves_of_importance_and_load_are_tutels_loss() -> None:
    """Its variance divides by E - 1."""
    routing = any_routing(0, 9, 4)
    routing = replace(routing, smooth_load_E=torch.tensor([2.0, 5.0, 1.0, 1.0], dtype=torch.float64))
    ours = term_of(Importance(), routing) / 2 + term_of(LoadCV(), routing) / 2
    importance_E, load_E = routing.scores_RE.sum(dim=0), routing.smooth_load_E
    assert load_E is not None
    tutels = sum(v.var() / (v.mean() ** 2 + 1e-10) for v in (importance_E, load_E)) / 2
    assert error(ours * 4 / 3, torch.as_tensor(tutels)) < 1e-9


@settings(max_examples=100)
@given(routing=routings)
def test_entropy_is_the_mean_over_tokens(routing: RouterOutput) -> None:
    rows = routing.scores_RE.tolist()
    want = sum(-p * math.log(p) for row in rows for p in row) / max(len(rows), 1)
    assert abs(routing_entropy(routing.scores_RE).item() - want) < 1e-12


def test_less_entropy_is_rewarded_and_certainty_has_a_gradient_of_zero() -> None:
    logits_RE = torch.tensor([[1.0, 0.5, 0.0], [3e4, 0.0, -3e4], [0.0, 0.0, 0.0]], requires_grad=True)
    value = Entropy(coefficient=1.0).coefficient * routing_entropy(logits_RE.softmax(dim=1))
    value.backward()
    assert logits_RE.grad is not None
    assert logits_RE.grad.isfinite().all()
    assert logits_RE.grad[0, 0] < 0 < logits_RE.grad[0, 2], "a step against the gradient must favour the best expert"
    assert not logits_RE.grad[1].any()
    stepped = (logits_RE - 0.1 * logits_RE.grad).softmax(dim=1)
    assert routing_entropy(stepped) < value


@settings(max_examples=100)
@given(routing=routings, groups=st.sampled_from([1, 2, 3, 6]), top_groups=st.integers(1, 6))
def test_balance_over_devices_equals_the_papers(routing: RouterOutput, groups: int, top_groups: int) -> None:
    """DeepSeekMoE eq. 15-17 and DeepSeek-V2 eq. 29-31, term by term."""
    num_experts, assignment = routing.assignment.num_experts, routing.assignment
    groups = math.gcd(groups, num_experts)
    top_groups = min(top_groups, groups)
    size, num_tokens = num_experts // groups, max(len(routing.token_R), 1)
    pairs = list(zip(assignment.token_N.tolist(), assignment.expert_N.tolist(), strict=True))
    mean_E = [float(routing.scores_RE[:, e].sum()) / num_tokens for e in range(num_experts)]
    device_loss = communication_loss = 0.0
    for device in range(groups):
        experts = range(device * size, (device + 1) * size)
        score = sum(mean_E[e] for e in experts)
        # f_e = N / (K T) * tokens that choose e, where K T is the number of choices
        f = [num_experts / max(len(pairs), 1) * sum(expert == e for _, expert in pairs) for e in experts]
        device_loss += sum(f) / size * score
        sent = len({token for token, expert in pairs if expert in experts})
        communication_loss += groups / (top_groups * num_tokens) * sent * score
    got = term_of(DeviceBalance(groups=groups), routing)
    assert abs(got.item() - device_loss) < 1e-12
    got = term_of(CommunicationBalance(groups=groups, top_groups=top_groups), routing)
    assert abs(got.item() - communication_loss) < 1e-12


def test_devices_of_one_expert_are_balanced_as_experts_are() -> None:
    routing = any_routing(1, 10, 6)
    assert error(term_of(DeviceBalance(groups=6), routing), term_of(LoadBalance(), routing)) < 1e-15
    assert term_of(DeviceBalance(groups=1), routing).item() == pytest.approx(1.0)


def test_balanced_devices_give_one_whatever_their_experts() -> None:
    """All tokens on experts 0 and 2 of four: experts are unbalanced, the two devices are not."""
    layer = MoE(4, 4, 4, router=TopK(k=2), losses=(DeviceBalance(groups=2), LoadBalance())).double()
    with torch.no_grad():
        score = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, 4)
        layer.router.get_submodule("score").get_parameter("weight_ED").copy_(score)
    device, expert = layer(torch.ones(6, 4, dtype=torch.float64)).losses
    assert device.value.item() == pytest.approx(1.0)
    assert expert.value.item() > 1.5


def test_losses_are_formed_in_the_layer_only_while_gradients_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x_TD, formed = MoE(8, 16, 4, losses=(LoadBalance(),)), torch.randn(9, 8), []
    term = LoadBalance.term

    def noted(*args: Any, **named: Any) -> LossTerm:
        formed.append(1)
        return term(*args, **named)

    monkeypatch.setattr(LoadBalance, "term", noted)
    (learned,) = layer(x_TD).losses
    assert formed == [1]
    with torch.no_grad():
        out = layer(x_TD)
        assert formed == [1]
        (asked,) = out.losses
    assert formed == [1, 1]
    assert out.losses[0] is asked
    assert torch.equal(asked.value, learned.value.detach())
    assert learned.value.requires_grad
