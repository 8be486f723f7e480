"""Laws of the auxiliary losses, for every row of the table and for each of ours."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.contracts.cases import draw, draw_case, error, simple_case
from turnout import MoE, reference
from turnout.contracts import Loss
from turnout.dispatch import FixedCapacity
from turnout.losses import LoadBalance, load_balance_loss, router_z_loss
from turnout.routers import GShardTop2, TopK
from turnout.tensors import LossTerm, Scope, total_loss

ROWS = Loss.TABLE.names()


@pytest.mark.parametrize("row", ROWS)
def test_a_term_carries_its_name_and_coefficient_and_is_one_finite_number(row: str) -> None:
    part = Loss.TABLE[row](coefficient=0.3)  # type: ignore[call-arg]
    for seed in range(20):
        case = replace(draw_case(seed), losses=(part,))
        layer, inputs = draw(case)
        (term,) = layer(inputs.x, mask=inputs.mask, token_ids=inputs.token_ids).losses
        assert (term.name, term.coefficient) == (row, 0.3)
        assert term.value.shape == ()
        assert term.value.isfinite()


@pytest.mark.parametrize("row", ROWS)
def test_a_term_does_not_see_which_choices_were_dropped(row: str) -> None:
    """The papers count the choices made; a loss that saw drops would change with the capacity."""
    part = Loss.TABLE[row](coefficient=0.3)  # type: ignore[call-arg]
    case = simple_case(losses=(part,))
    layer, inputs = draw(case)
    tight, _ = draw(replace(case, capacity=FixedCapacity(factor=0.25)))
    assert torch.equal(layer(inputs.x).losses[0].value, tight(inputs.x).losses[0].value)


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
        layer = MoE(12, 4, 3, losses=tuple(Loss.TABLE[row]() for row in ROWS))
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
