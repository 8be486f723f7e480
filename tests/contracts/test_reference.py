"""The oracle itself, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from turnout import reference
from turnout.experts.activations import Activation


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


LOGITS = torch.log(matrix([5, 3, 1, 1], [1, 1, 2, 6]))  # softmax 0.5 0.3 0.1 0.1 and 0.1 0.1 0.2 0.6


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=0, atol=1e-15)


def test_softmax_gates_renormalised_or_not() -> None:
    chosen = reference.best_experts(LOGITS, 2)
    assert chosen.tolist() == [[0, 1], [3, 2]]
    plain = reference.topk_gates(LOGITS, chosen, renormalize=False)
    assert close(plain, matrix([0.5, 0.3, 0, 0], [0, 0, 0.2, 0.6]))
    halved = reference.topk_gates(LOGITS, chosen, scale=0.5)
    assert close(halved, matrix([0.3125, 0.1875, 0, 0], [0, 0, 0.125, 0.375]))


def test_sigmoid_gates() -> None:
    logits_TE = matrix([0.0, math.log(3), -100.0])
    chosen = reference.best_experts(logits_TE, 2)
    assert close(
        reference.topk_gates(logits_TE, chosen, activation="sigmoid", renormalize=False), matrix([0.5, 0.75, 0])
    )
    assert close(reference.topk_gates(logits_TE, chosen, activation="sigmoid"), matrix([0.4, 0.6, 0]))


def test_switch_gate_is_the_probability_of_the_best() -> None:
    assert close(reference.switch_gates(LOGITS), matrix([0.5, 0, 0, 0], [0, 0, 0, 0.6]))


def test_equal_scores_go_to_the_lower_index() -> None:
    assert reference.best_experts(matrix([1, 2, 2, 1, 2]), 4).tolist() == [[1, 2, 4, 0]]


def test_groups_are_limited_to_those_with_the_best_pair() -> None:
    scores_TE = matrix([9, 0, 5, 5, 6, 3])  # pairs: 9, 10, 9; the tie goes to the lower group
    limited_TE = reference.within_groups(scores_TE, groups=3, top_groups=2)
    assert close(limited_TE, matrix([9, 0, 5, 5, -math.inf, -math.inf]))


def test_algorithm_1_on_three_tokens_and_a_capacity_of_one() -> None:
    """All want expert 0 first; the second choices meet queues that first choices have already filled."""
    logits_SE = torch.log(matrix([6, 3, 1], [6, 1, 3], [8, 1, 1]))
    gating = reference.gshard_gating(logits_SE, torch.tensor([0.5, 0.99, 0.1]).double(), capacity=1)
    assert gating.expert_S2.tolist() == [[0, 1], [0, 2], [0, 1]]
    assert gating.position_S2.tolist() == [[0, 0], [1, 0], [2, 1]]
    # token 0: both fit, 2 g2 = 2/3 > 0.5; token 1: 2/3 < 0.99; token 2: both queues full
    assert gating.kept_S2.tolist() == [[True, True], [False, False], [False, False]]
    assert close(gating.gate_SE, matrix([2 / 3, 1 / 3, 0], [0, 0, 0], [0, 0, 0]))
    assert math.isclose(gating.loss.item(), (3 / 3 * (0.6 + 0.6 + 0.8) / 3) / 3)


def test_a_declined_second_choice_still_holds_its_place() -> None:
    logits_SE = torch.log(matrix([6, 3, 1], [6, 3, 1]))
    gating = reference.gshard_gating(logits_SE, torch.tensor([0.9, 0.1]).double(), capacity=1)
    assert gating.position_S2[:, 1].tolist() == [0, 1]
    assert gating.kept_S2[:, 1].tolist() == [False, False]


def test_balanced_algorithm_1_loss_is_one_over_e_squared() -> None:
    logits_SE = torch.zeros(4, 4, dtype=torch.float64).fill_diagonal_(1e-12)
    gating = reference.gshard_gating(logits_SE, torch.zeros(4).double(), capacity=2)
    assert math.isclose(gating.loss.item(), 1 / 16)


def test_hashed_experts_by_hand() -> None:
    """6 experts, p = 2^31 - 1; strides that share no factor with 6: 1 and 5."""
    functions = [(7, 3), (1, 2)]
    # id 0: first (3 mod 6) = 3, stride number (2 mod 2) = 0; id 5: first (38 mod 6) = 2, stride number (7 mod 2) = 1
    assert reference.hash_experts([0, 5], functions, 6, 3).tolist() == [[3, 4, 5], [2, 1, 0]]
    # (2^30 * 2 + 0) mod p = 1
    assert reference.hash_experts([2], [(2**30, 0), (1, 0)], 6, 1).tolist() == [[1]]
    assert reference.hash_experts([0, 5], functions, 1, 1).tolist() == [[0], [0]]


def test_even_gates_share_the_scale() -> None:
    chosen = torch.tensor([[0, 2], [1, 0]])
    assert close(reference.even_gates(chosen, 3, scale=3.0), matrix([1.5, 0, 1.5], [1.5, 1.5, 0]))
    assert close(reference.even_gates(chosen, 3), matrix([0.5, 0, 0.5], [0.5, 0.5, 0]))


def test_places_queue_first_choices_before_second() -> None:
    assert reference.places(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2).tolist() == [[0, 1], [0, 2], [1, 2]]


def test_balance_loss_by_hand() -> None:
    scores_TE = matrix([0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6])
    # first choices 0 and 3, half of the load each
    want = 4 * (0.5 * 0.3 + 0.5 * 0.35)
    assert math.isclose(reference.load_balance(scores_TE, torch.tensor([[0], [3]])).item(), want)


def test_z_loss_by_hand() -> None:
    assert math.isclose(reference.z_loss(LOGITS).item(), math.log(10) ** 2)


def test_moe_adds_gated_experts_and_the_shared_expert() -> None:
    x_TD = matrix([1, 2], [3, 4])
    y_TD = reference.moe(x_TD, matrix([0.5, 0], [1, 2]), [lambda x: 10 * x, lambda x: x + 1], shared=lambda x: -x)
    assert close(y_TD, matrix([5 - 1, 10 - 2], [30 + 8 - 3, 40 + 10 - 4]))


@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu", "swiglu_clamped"])
def test_ffn_equals_the_table_of_activations(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(s, generator=generator).double() * 3 for s in ((9, 4), (4, 10), (10,), (3,))]
    down_FD = torch.randn(5 if Activation.TABLE[kind].gated else 10, 3, generator=generator).double()
    x_TD, up_DG, up_bias_G, down_bias_D = draw
    got = reference.ffn(x_TD, up_DG, down_FD, kind=kind, up_bias_G=up_bias_G, down_bias_D=down_bias_D)
    want = Activation.TABLE[kind](x_TD @ up_DG + up_bias_G) @ down_FD + down_bias_D
    assert torch.allclose(got, want, rtol=0, atol=1e-13)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError, match="the oracle has no expert kind 'cubic'"):
        reference.ffn(matrix([1.0]), matrix([1.0]), matrix([1.0]), kind="cubic")


def test_no_tokens_give_no_rows_and_zero_losses() -> None:
    nothing_TE = torch.zeros(0, 3, dtype=torch.float64)
    assert reference.best_experts(nothing_TE, 2).shape == (0, 2)
    assert reference.topk_gates(nothing_TE, reference.best_experts(nothing_TE, 2)).shape == (0, 3)
    assert reference.z_loss(nothing_TE).item() == 0
    assert reference.load_balance(nothing_TE, torch.zeros(0, 2, dtype=torch.int64)).item() == 0
    assert reference.gshard_gating(nothing_TE, torch.zeros(0), 1).loss.item() == 0
