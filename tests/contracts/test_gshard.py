"""The vectorised GShard router with a fixed capacity is algorithm 1 of the paper, loop by loop."""

import pytest
import torch
from torch import Tensor

from turnout import MoE, reference
from turnout.dispatch import FixedCapacity
from turnout.dispatch.capacity import queue_position
from turnout.losses import LoadBalance, load_balance_loss
from turnout.routers import GShardTop2
from turnout.tensors import RouterOutput

CASES, CHUNK = 1000, 250
FACTORS = (0.25, 0.5, 1.0, 1.25, 4.0)


@pytest.mark.parametrize("numbers", [range(start, start + CHUNK) for start in range(0, CASES, CHUNK)])
def test_router_and_capacity_equal_the_loops_of_the_paper(numbers: range) -> None:
    for number in numbers:
        check_algorithm_1(number)


def check_algorithm_1(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    num_tokens, num_experts = number % 41, 2 + number % 9
    x_SD, weight_ED = drawn(number, num_tokens, num_experts, generator)
    router = GShardTop2().build(x_SD.shape[1], num_experts).double().train()
    with torch.no_grad():
        router.get_submodule("score").get_parameter("weight_ED").copy_(weight_ED)
    routing: RouterOutput = router(x_SD, None, None, torch.Generator().manual_seed(number))
    policy = FixedCapacity(factor=FACTORS[number % len(FACTORS)], minimum=0)
    admission = policy.admit(routing.assignment)
    assert admission.capacity is not None
    draw_S = torch.rand(num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    want = reference.gshard_gating(x_SD @ weight_ED.T, draw_S, admission.capacity)

    assignment = routing.assignment
    expert_S2, weight_S2 = assignment.as_topk()
    position_N = queue_position(assignment, assignment.expert_N, num_experts)
    assert admission.keep_N is not None
    kept_S2 = admission.keep_N.view(-1, 2)
    assert torch.equal(expert_S2, want.expert_S2), number
    assert torch.equal(position_N.view(-1, 2), want.position_S2), number
    assert torch.equal(kept_S2, want.kept_S2), number
    gate_SE = torch.zeros_like(want.gate_SE).scatter(1, expert_S2, weight_S2 * kept_S2)
    # g1 / (g1 + g2) and the softmax of two logits differ in their last bits
    assert torch.allclose(gate_SE, want.gate_SE, rtol=0, atol=5e-16), number
    term = LoadBalance(count="first").term(routing, admission, sequence_length=max(num_tokens, 1))
    assert torch.allclose(term.value, want.loss * num_experts**2, rtol=1e-14, atol=0), number


def drawn(number: int, num_tokens: int, num_experts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and router weights; every third case lies on a lattice, where logits are exact and often tie."""
    dim = 1 + number % 6
    if number % 3 == 0:
        x_SD = torch.randint(-2, 3, (num_tokens, dim), generator=generator) / 2
        return x_SD.double(), (torch.randint(-2, 3, (num_experts, dim), generator=generator) / 2).double()
    x_SD = torch.randn(num_tokens, dim, generator=generator).double()
    return x_SD, torch.randn(num_experts, dim, generator=generator).double()


@pytest.mark.parametrize("num_experts", [2, 4, 8, 64])
def test_uniform_routing_gives_a_loss_of_exactly_one(num_experts: int) -> None:
    """In the form normalised by E^2; the printed form is 1 / E^2 of it."""
    num_tokens = 4 * num_experts
    scores_SE = torch.full((num_tokens, num_experts), 1 / num_experts)
    counts_E = torch.full((num_experts,), num_tokens // num_experts)
    assert load_balance_loss(scores_SE, counts_E).item() == 1.0


@pytest.mark.parametrize("num_experts", [3, 5, 7, 60])
def test_uniform_routing_gives_a_loss_of_one_where_one_over_e_is_not_a_binary_fraction(num_experts: int) -> None:
    scores_SE = torch.full((4 * num_experts, num_experts), 1 / num_experts, dtype=torch.float64)
    counts_E = torch.full((num_experts,), 4)
    assert abs(load_balance_loss(scores_SE, counts_E).item() - 1.0) < 1e-15


def test_second_choice_is_sent_with_probability_two_g2() -> None:
    num_tokens = 20_000
    router = GShardTop2().build(2, 2).train()
    with torch.no_grad():
        router.get_submodule("score").get_parameter("weight_ED").copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    x_TD = torch.ones(num_tokens, 2)
    assignment = router(x_TD, None, None, torch.Generator().manual_seed(0)).assignment
    g2 = float(assignment.as_topk()[1][0, 1].detach())
    assert assignment.declined_N is not None
    sent_share = 1 - float(assignment.declined_N.view(-1, 2)[:, 1].double().mean())
    assert abs(sent_share - 2 * g2) < 4 * (0.25 / num_tokens) ** 0.5


@pytest.mark.parametrize("change", ["evaluation", "all"])
def test_second_choice_is_always_sent_in_evaluation_and_by_the_policy_all(change: str) -> None:
    layer = MoE(8, 6, 4, router=GShardTop2(second_expert="all" if change == "all" else "random"))
    layer.train(change != "evaluation")
    assert int(layer(torch.randn(50, 8)).stats.dropped_policy_E.sum()) == 0


def test_a_kept_weight_is_not_renormalised_when_its_partner_is_dropped() -> None:
    layer = MoE(8, 6, 4, router=GShardTop2(), capacity=FixedCapacity(factor=0.25)).double()
    x_TD = torch.randn(64, 8, dtype=torch.float64)
    routing = layer.router(x_TD, None, None, torch.Generator().manual_seed(0))
    keep_N = layer.config.capacity.admit(routing.assignment).keep_N
    assert keep_N is not None
    keep_R2 = keep_N.view(-1, 2)
    half_kept_R = keep_R2.sum(dim=1) == 1
    assert half_kept_R.any()
    weight_R2 = routing.assignment.as_topk()[1]
    assert torch.allclose(weight_R2.sum(dim=1), torch.ones(64, dtype=torch.float64))
    assert (weight_R2[keep_R2] < 1).all()
