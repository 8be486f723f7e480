"""Padding changes nothing, bit for bit: outputs, losses, statistics and gradients of the real tokens."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from tests.contracts.cases import Case, Inputs, Result, draw, draw_case, run_layer, takers
from turnout import MoE, MoEOutput
from turnout.contracts import ExpertBackend
from turnout.dispatch import FixedCapacity
from turnout.losses import LoadBalance

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
QUICK, SWEEP, CHUNK = range(9000, 9050), 500, 125
CHUNKS = [range(start, start + CHUNK) for start in range(0, SWEEP, CHUNK)]


def test_padding_anywhere_changes_nothing() -> None:
    for number in QUICK:
        check_against_compact(number)


def test_padding_after_each_sequence_changes_nothing() -> None:
    for number in QUICK:
        check_appended(number)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    for number in QUICK:
        check_content(number)


@pytest.mark.exhaustive
@pytest.mark.parametrize("numbers", CHUNKS)
def test_padding_changes_nothing_in_five_hundred_cases(numbers: range) -> None:
    for number in numbers:
        (check_against_compact, check_appended, check_content)[number % 3](number)


def check_against_compact(number: int) -> None:
    """Masked tokens, full of NaN, against a batch in which they are missing."""
    case = without_positions(replace(draw_case(number), padding=(0.2, 0.5, 0.9)[number % 3]))
    layer, inputs = draw_typed(case, number)
    mask = inputs.mask
    assert mask is not None
    padded, padded_out = run_layer(layer, with_padding_full_of(float("nan"), inputs), case.seed)
    compact = replace(inputs, x=inputs.x[mask], y_grad=inputs.y_grad[mask], token_ids=inputs.token_ids[mask], mask=None)
    plain, plain_out = run_layer(layer, compact, case.seed)
    assert_same(take(padded, mask), plain, case)
    assert_zero_at_padding(padded, mask, case)
    assert_same_stats(padded_out, plain_out, case)


def check_appended(number: int) -> None:
    """Every sequence with padding behind it, full of NaN, against the sequences alone."""
    case = replace(draw_case(number), shape=(1 + number % 4, number % 23), padding=None)
    if case.shape[0] > 1 and isinstance(case.capacity, FixedCapacity):
        case = replace(case, capacity=replace(case.capacity, group_size=0))
    layer, inputs = draw_typed(case, number)
    plain, plain_out = run_layer(layer, inputs, case.seed)
    width = 1 + number % 5
    longer = Inputs(
        x=appended(inputs.x, width, float("nan")),
        mask=appended(torch.ones(case.shape, dtype=torch.bool), width, False),
        token_ids=appended(inputs.token_ids, width, 0),
        y_grad=appended(inputs.y_grad, width, 1.0),
        parameters=inputs.parameters,
    )
    assert longer.mask is not None
    padded, padded_out = run_layer(layer, longer, case.seed)
    shaped = replace(plain, y=plain.y.flatten(0, 1), grads={**plain.grads, "x": rows(plain.grads["x"])})
    assert_same(take(padded, longer.mask), shaped, case)
    assert_zero_at_padding(padded, longer.mask, case)
    assert_same_stats(padded_out, plain_out, case)


def check_content(number: int) -> None:
    """The same mask over NaN, over infinity and over the tokens drawn; any policy and any scope of loss."""
    case = replace(draw_case(number), padding=(0.2, 0.5, 1.0)[number % 3])
    layer, inputs = draw_typed(case, number)
    plain, plain_out = run_layer(layer, inputs, case.seed)
    for content in (float("nan"), float("inf")):
        other, other_out = run_layer(layer, with_padding_full_of(content, inputs), case.seed)
        assert_same(other, plain, case)
        assert_same_stats(other_out, plain_out, case)


@pytest.mark.parametrize("backend", takers(torch.float32))
def test_a_batch_of_padding_alone_gives_zeros_and_zero_gradients(backend: str) -> None:
    layer = MoE(8, 6, 4, shared_hidden=4, bias=True, backend=backend)
    x = torch.full((2, 5, 8), float("nan"), requires_grad=True)
    out = layer(x, mask=torch.zeros(2, 5, dtype=torch.bool))
    (out.y.sum() + sum(term.value for term in out.losses)).backward()
    assert torch.equal(out.y, torch.zeros_like(out.y))
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert not any(value.any() for value in (x.grad, *(p.grad for p in layer.parameters())) if value is not None)
    assert [int(out.stats.num_routed), int(out.stats.num_padding)] == [0, 10]


def draw_typed(case: Case, number: int) -> tuple[MoE, Inputs]:
    """The case in one of DTYPES on one of the backends that take it."""
    dtype = DTYPES[number % len(DTYPES)]
    layer, inputs = draw(case, dtype=dtype)
    names = [
        name
        for name, backend in ExpertBackend.TABLE.items()
        if backend.refusal(layer.experts, dtype=dtype, device=torch.device("cpu")) is None
    ]
    return draw(case, backend=names[number % len(names)], dtype=dtype)[0], inputs


def without_positions(case: Case) -> Case:
    """The case without settings that speak of a token's place in the batch, which taking tokens out would change."""
    capacity = case.capacity
    if isinstance(capacity, FixedCapacity):
        capacity = replace(capacity, group_size=0)
    losses = tuple(
        replace(loss, scope="micro_batch") if isinstance(loss, LoadBalance) else loss for loss in case.losses
    )
    return replace(case, capacity=capacity, losses=losses)


def with_padding_full_of(content: float, inputs: Inputs) -> Inputs:
    assert inputs.mask is not None
    return replace(inputs, x=inputs.x.masked_fill(~inputs.mask.unsqueeze(-1), content))


def appended(value: Tensor, width: int, content: float) -> Tensor:
    shape = (value.shape[0], width, *value.shape[2:])
    return torch.cat([value, torch.full(shape, content, dtype=value.dtype)], dim=1)


def rows(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.flatten(0, 1)


def take(result: Result, mask: Tensor) -> Result:
    """The result at the real tokens."""
    x_grad = result.grads["x"]
    assert x_grad is not None
    return replace(result, y=result.y[mask], grads={**result.grads, "x": x_grad[mask]})


def assert_same(got: Result, want: Result, case: Case) -> None:
    assert torch.equal(got.y, want.y), f"y differs in {case}"
    for name, value in want.losses.items():
        assert torch.equal(got.losses[name], value), f"loss {name} differs in {case}"
    for name, value in want.grads.items():
        other = got.grads[name]
        assert value is not None, f"no gradient of {name} in {case}"
        assert other is not None, f"no gradient of {name} in {case}"
        assert torch.equal(other, value), f"gradient of {name} differs by {(other - value).abs().max()} in {case}"


def assert_zero_at_padding(result: Result, mask: Tensor, case: Case) -> None:
    x_grad = result.grads["x"]
    assert x_grad is not None
    for name, value in (("y", result.y), ("gradient of x", x_grad)):
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask])), f"{name} at padding is not 0 in {case}"


def assert_same_stats(got: MoEOutput, want: MoEOutput, case: Case) -> None:
    for field in fields(got.stats):
        if field.name != "num_padding":
            values = getattr(got.stats, field.name), getattr(want.stats, field.name)
            assert torch.equal(*values), f"{field.name} is {values[0]}, without padding {values[1]} in {case}"
