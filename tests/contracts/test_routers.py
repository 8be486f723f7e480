"""What every row of the router table promises, and what each of ours does besides."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.contracts.cases import Case, draw, draw_case, error, fitting_dim, loss_of, simple_case
from turnout import MoE, reference, total_loss
from turnout.contracts import Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.routers import DeepSeekV3, Hash, Switch, TopK
from turnout.routers.hash import HashRouter
from turnout.routers.pieces import MOST_ARGMAX_PASSES, select_topk
from turnout.tensors import RouterOutput

ROWS = RouterConfig.TABLE.names()


def cases_of(row: str, count: int) -> list[Case]:
    """Random cases of one router."""
    return [case_of(row, number) for number in range(count)]


def case_of(row: str, number: int) -> Case:
    """`draw_case` takes the rows in turn."""
    return draw_case(50_000 + ROWS.index(row) - 50_000 % len(ROWS) + len(ROWS) * number)


def wide_case_of(row: str) -> Case:
    """One with so many experts that every group of a hierarchy has a choice, and no more than that takes."""
    return next(case for case in (case_of(row, number) for number in range(200)) if 12 <= case.num_experts <= 16)


def is_fed(row: str, loss: str) -> bool:
    """Whether the router can feed the loss; if not, the layer says so when it is built, as test_errors.py has it."""
    case = wide_case_of(row)
    try:
        loss_of(loss, case.num_experts, coefficient=1.0).check(case.router, case.num_experts)
    except ConfigError:
        return False
    return True


def routed(layer: MoE, x: Tensor, mask: Tensor | None, token_ids: Tensor, seed: int = 0) -> RouterOutput:
    mask_T = None if mask is None else mask.reshape(-1)
    generator = torch.Generator().manual_seed(seed)
    return layer.router(x.reshape(-1, layer.dim), token_ids.reshape(-1), mask_T, generator)


@pytest.mark.parametrize("row", ROWS)
def test_an_assignment_is_well_formed(row: str) -> None:
    for case in cases_of(row, 25):
        layer, inputs = draw(case)
        assert isinstance(case.router, RouterConfig.TABLE[row])
        routing = routed(layer, inputs.x, inputs.mask, inputs.token_ids)
        assignment = routing.assignment
        real_T = torch.ones(case.num_tokens) if inputs.mask is None else inputs.mask.reshape(-1)
        assert torch.equal(routing.token_R, real_T.nonzero().flatten()), case
        num_routed = len(routing.token_R)
        assert routing.logits_RE.shape == routing.scores_RE.shape == (num_routed, case.num_experts), case
        assert error(routing.scores_RE.sum(dim=1), torch.ones(num_routed, dtype=torch.float64)) < 1e-14, case
        # where the number varies, `choices` is the number aimed at
        most = case.num_experts if assignment.top_k is None else case.router.choices
        assert len(assignment.token_N) <= num_routed * most, case
        assert real_T[assignment.token_N].all(), f"padding was assigned in {case}"
        pairs_N = assignment.token_N * case.num_experts + assignment.expert_N
        assert len(pairs_N.unique()) == len(pairs_N), f"a token goes to one expert twice in {case}"
        choices_N = assignment.token_N * most + assignment.choice_N
        assert len(choices_N.unique()) == len(choices_N), f"a choice is made twice in {case}"
        assert assignment.weight_N.isfinite().all()
        assert int(assignment.counts_E.sum()) == len(assignment.token_N)
        if assignment.top_k is not None:
            assert len(assignment.token_N) == num_routed * assignment.top_k
            assert torch.equal(assignment.token_N, routing.token_R.repeat_interleave(assignment.top_k))


# "forced" deals tokens out by their place, and nothing else
@pytest.mark.parametrize("row", [row for row in ROWS if row != "forced"])
def test_the_order_of_tokens_does_not_matter_without_a_capacity(row: str) -> None:
    for case in cases_of(row, 12):
        case = simple_case(
            router=case.router, num_experts=case.num_experts, training=False, shape=(33,), seed=case.seed
        )
        layer, inputs = draw(case)
        # no two tokens alike: a limit that cuts among equals may go by their order
        x_TD = inputs.x + 0.01 * torch.rand(inputs.x.shape, generator=torch.Generator().manual_seed(1)).double()
        ids_T = inputs.token_ids
        order_T = torch.randperm(33, generator=torch.Generator().manual_seed(case.seed))
        y_TD = layer(x_TD, token_ids=ids_T).y
        assert error(layer(x_TD[order_T], token_ids=ids_T[order_T]).y, y_TD[order_T]) < 1e-12, case


@pytest.mark.parametrize("row", ROWS)
def test_a_bfloat16_model_routes_as_its_weights_would_in_float32(row: str) -> None:
    for case in cases_of(row, 12):
        layer, inputs = draw(replace(case, dim=fitting_dim(case.router, case.num_experts, 24)), dtype=torch.bfloat16)
        wide = deepcopy(layer).float()
        x = inputs.x.bfloat16()
        got = routed(layer, x, inputs.mask, inputs.token_ids)
        want = routed(wide, x.float(), inputs.mask, inputs.token_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = routed(wide, x.float(), inputs.mask, inputs.token_ids)
        for other in (got, under_autocast):
            assert other.logits_RE.dtype == other.assignment.weight_N.dtype == torch.float32
            assert torch.equal(other.logits_RE, want.logits_RE), case
            assert torch.equal(other.assignment.expert_N, want.assignment.expert_N), case
            assert torch.equal(other.assignment.weight_N, want.assignment.weight_N), case


@pytest.mark.parametrize("row", ROWS)
def test_the_same_generator_gives_the_same_routing(row: str) -> None:
    for case in cases_of(row, 10):
        layer, inputs = draw(case)
        first = routed(layer, inputs.x, inputs.mask, inputs.token_ids, seed=3).assignment
        again = routed(layer, inputs.x, inputs.mask, inputs.token_ids, seed=3).assignment
        assert torch.equal(first.weight_N, again.weight_N)
        assert torch.equal(first.expert_N, again.expert_N)
        assert (first.declined_N is None) == (again.declined_N is None)
        if first.declined_N is not None and again.declined_N is not None:
            assert torch.equal(first.declined_N, again.declined_N)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("logit", [-3e4, -200.0, 0.0, 200.0, 3e4])
def test_extreme_logits_give_finite_weights_and_gradients(row: str, logit: float) -> None:
    for case in cases_of(row, 4):
        case = simple_case(router=case.router, num_experts=case.num_experts, dim=1, shape=(6,))
        layer, inputs = draw(case, dtype=torch.float32)
        with torch.no_grad():
            for parameter in layer.router.parameters():
                parameter.fill_(logit)
        x = torch.ones(6, layer.dim, requires_grad=True)
        out = layer(x, token_ids=inputs.token_ids, generator=torch.Generator().manual_seed(0))
        (out.y.sum() + total_loss(out.losses)).backward()
        assert out.y.isfinite().all(), case
        assert all(term.value.isfinite() for term in out.losses), case
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters()), case


@pytest.mark.parametrize(
    ("loss", "row"), [(loss, row) for loss in Loss.TABLE.names() for row in ROWS if is_fed(row, loss)]
)
def test_with_the_main_loss_at_zero_the_router_moves_by_exactly_the_coefficient(row: str, loss: str) -> None:
    drawn = wide_case_of(row)
    grads = {}
    for coefficient in (1.0, 0.25, 0.0):
        # a power of two, so that scaling rounds nothing
        part = loss_of(loss, drawn.num_experts, coefficient=coefficient)
        layer, inputs = draw(simple_case(router=drawn.router, num_experts=drawn.num_experts, losses=(part,)))
        out = layer(inputs.x, token_ids=inputs.token_ids, generator=torch.Generator().manual_seed(0))
        # the router's own terms come first, and have their own coefficients
        (0 * out.y.sum() + total_loss(out.losses[-1:])).backward()
        grads[coefficient] = {name: p.grad for name, p in layer.named_parameters()}
    for name, unit in grads[1.0].items():
        assert unit is not None
        assert torch.equal(grads[0.25][name], 0.25 * unit)
        assert torch.equal(grads[0.0][name], torch.zeros_like(unit))
        assert bool(unit.any()) == name.startswith("router."), name


@pytest.mark.parametrize("row", ROWS)
def test_the_main_loss_alone_moves_the_router(row: str) -> None:
    for case in cases_of(row, 20):
        if case.num_experts == 1:
            continue
        layer, inputs = draw(simple_case(router=case.router, num_experts=case.num_experts, losses=()))
        layer(inputs.x, token_ids=inputs.token_ids).y.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.router.parameters()), case


# the compiled kernel reads float32; float64 goes through torch, as all does where there is no compiler
@settings(max_examples=400)
@given(
    data=st.data(),
    num_experts=st.integers(1, 20),
    num_tokens=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_selection_takes_the_best_and_of_equals_the_lower_index(
    data: st.DataObject, num_experts: int, num_tokens: int, dtype: torch.dtype
) -> None:
    k = data.draw(st.integers(1, num_experts))
    values = st.lists(st.integers(-2, 2), min_size=num_experts, max_size=num_experts)
    rows = data.draw(st.lists(values, min_size=num_tokens, max_size=num_tokens))
    scores_RE = torch.tensor(rows, dtype=dtype).reshape(num_tokens, num_experts)
    assert torch.equal(select_topk(scores_RE, k), reference.best_experts(scores_RE, k))


@pytest.mark.parametrize("k", [1, MOST_ARGMAX_PASSES, MOST_ARGMAX_PASSES + 1])
def test_selection_does_not_touch_the_scores(k: int) -> None:
    scores_RE = torch.randn(5, 12)
    before = scores_RE.clone()
    select_topk(scores_RE, k)
    assert torch.equal(scores_RE, before)


def test_renormalised_weights_sum_to_the_scale() -> None:
    for activation in ("softmax", "sigmoid"):
        router = TopK(k=3, activation=activation, scale=2.5).build(6, 9).double()
        weight_RK = router(torch.randn(40, 6, dtype=torch.float64)).assignment.as_topk()[1]
        assert error(weight_RK.sum(dim=1), torch.full((40,), 2.5, dtype=torch.float64)) < 1e-14


def test_saturated_sigmoids_still_choose_the_larger_logit() -> None:
    router = TopK(k=1, activation="sigmoid", renormalize=False).build(1, 2)
    with torch.no_grad():
        router.get_parameter("score.weight_ED").copy_(torch.tensor([[100.0], [200.0]]))
    assert router(torch.ones(1, 1)).assignment.expert_N.tolist() == [1]


def test_switch_jitters_in_training_alone() -> None:
    router = Switch(jitter=0.3).build(6, 4)
    x_TD = torch.randn(20, 6)
    plain = Switch().build(6, 4)
    plain.load_state_dict(router.state_dict())
    assert torch.equal(router.eval()(x_TD).logits_RE, plain(x_TD).logits_RE)
    assert not torch.equal(router.train()(x_TD).logits_RE, plain(x_TD).logits_RE)


def test_switch_jitter_stays_within_its_bounds() -> None:
    router = Switch(jitter=0.25).build(1, 2).train()
    with torch.no_grad():
        router.get_parameter("score.weight_ED").fill_(1.0)
    logits_RE = router(torch.ones(5000, 1)).logits_RE.detach()
    assert 0.75 <= float(logits_RE.min()) < 0.76
    assert 1.24 < float(logits_RE.max()) <= 1.25


def test_the_bias_that_balances_keeps_its_steps_in_a_bfloat16_model() -> None:
    router = DeepSeekV3(k=2, bias_step=0.001).build(8, 4).bfloat16()
    stats = MoE(dim=8, hidden=4, num_experts=4, router=router)(torch.randn(64, 8, dtype=torch.bfloat16)).stats
    router.bias_E.fill_(1.0)
    for _ in range(10):
        router.after_step(replace(stats, assigned_E=torch.tensor([4, 2, 1, 1])))
    assert router.bias_E.dtype == torch.float32
    torch.testing.assert_close(router.bias_E, torch.tensor([0.99, 1.0, 1.01, 1.01]))


def test_a_bias_may_move_in_proportion_to_what_its_expert_lacks() -> None:
    router = DeepSeekV3(k=2, bias_step=0.01, bias_update="error").build(8, 4)
    layer = MoE(dim=8, hidden=4, num_experts=4, router=router)
    stats = layer(torch.randn(64, 8)).stats
    router.after_step(replace(stats, assigned_E=torch.tensor([4, 2, 1, 1])))
    # over the mean of 2
    torch.testing.assert_close(router.bias_E, torch.tensor([-0.01, 0.0, 0.005, 0.005]))
    router.after_step(replace(stats, assigned_E=torch.tensor([0, 0, 0, 0])))
    torch.testing.assert_close(router.bias_E, torch.tensor([-0.01, 0.0, 0.005, 0.005]))


def test_the_bias_that_balances_moves_with_its_router() -> None:
    router = DeepSeekV3(k=2).build(8, 4)
    assert router.to("meta", torch.bfloat16).bias_E.is_meta
    placed = router.to_empty(device="cpu")
    placed.reset_parameters()
    assert placed.bias_E.tolist() == [0.0] * 4


@pytest.mark.parametrize(("k", "num_experts"), [(1, 1), (1, 7), (2, 2), (3, 12), (8, 8), (5, 64)])
def test_hash_gives_one_id_the_same_experts_everywhere_and_k_different_ones(k: int, num_experts: int) -> None:
    router = Hash(k=k, scale=3.0).build(4, num_experts)
    ids_T = torch.arange(2**31 - 40, 2**31).repeat(2)
    routing = router(torch.randn(80, 4), ids_T)
    expert_TK, weight_TK = routing.assignment.as_topk()
    assert torch.equal(expert_TK[:40], expert_TK[40:])
    assert all(len(set(row)) == k for row in expert_TK.tolist())
    assert torch.allclose(weight_TK.sum(dim=1), torch.tensor(3.0))
    assert torch.allclose(routing.logits_RE.softmax(dim=1), routing.scores_RE)


def test_hash_spreads_ids_evenly_and_differently_in_each_layer() -> None:
    torch.manual_seed(0)
    routers = [Hash(k=2).build(4, 8) for _ in range(2)]
    ids_T = torch.arange(20_000)
    first, second = (router(torch.zeros(20_000, 4), ids_T).assignment.as_topk()[0] for router in routers)
    pairs = torch.zeros(8, 8).index_put_((first[:, 0], second[:, 0]), torch.ones(20_000), accumulate=True)
    assert pairs.min() > 0.5 * 20_000 / 64  # independent: every pair of experts meets
    assert torch.bincount(first[:, 1], minlength=8).min() > 0.8 * 20_000 / 8


def test_hash_keeps_the_evenest_function_it_drew() -> None:
    counts_V = torch.bincount((torch.rand(50_000, generator=torch.Generator().manual_seed(0)) ** 2 * 900).long())

    def greatest_load(router: nn.Module) -> float:
        ids_T = torch.repeat_interleave(counts_V)
        load_E = router(torch.zeros(len(ids_T), 4), ids_T).assignment.counts_E
        return float(load_E.max() / load_E.double().mean())

    loads = []
    for tries in (1, 64):
        torch.manual_seed(1)
        router = Hash(tries=tries).build(4, 16)
        drawn = greatest_load(router)
        assert isinstance(router, HashRouter)
        router.before_training(counts_V)
        loads.append(greatest_load(router))
        assert loads[-1] <= drawn
    assert loads[0] == drawn
    assert loads[1] < 0.95 * loads[0]
