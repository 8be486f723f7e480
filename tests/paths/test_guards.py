"""NaN and infinity are found in the step they appear in, and named; spikes are told from noise."""

import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from turnout.errors import ConfigError
from turnout.observe.spikes import SpikeRule, is_spike
from turnout.train.guards import clip_and_check, nonfinite_report

SHAPES = {
    "embedding.weight": (50, 8),
    "layers.0.norm.weight": (8,),
    "layers.2.moe.experts.up_EDG": (8, 16, 32),
    "layers.2.moe.experts.down_bias_ED": (8, 16),
    "layers.2.moe.router.weight": (8, 16),
    "scale": (),
}


def tensors() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def with_grads() -> dict[str, nn.Parameter]:
    params = {name: nn.Parameter(tensor) for name, tensor in tensors().items()}
    for parameter in params.values():
        parameter.grad = torch.randn_like(parameter)
    return params


def test_a_hundred_injected_values_are_found_and_named() -> None:
    draw = random.Random(0)
    for _ in range(100):
        found = tensors()
        name = draw.choice(list(SHAPES))
        flat = found[name].reshape(-1)
        place = draw.randrange(flat.numel())
        bad = draw.choice([math.nan, math.inf, -math.inf])
        flat[place] = bad
        report = nonfinite_report(found.items())
        kind = "NaN" if math.isnan(bad) else "infinite"
        expert = ""
        if "_E" in name:
            expert = f", expert {place // found[name][0].numel()}"
        assert report == f"{name}{expert}: 1 of {flat.numel()} values are {kind}"


def test_the_report_counts_values_experts_and_further_tensors() -> None:
    found = tensors()
    found["layers.2.moe.experts.up_EDG"][5, 0, :2] = math.nan
    found["layers.2.moe.experts.up_EDG"][1, 3, 3] = math.inf
    found["scale"].fill_(math.nan)
    report = nonfinite_report(found.items())
    assert report == (
        "layers.2.moe.experts.up_EDG, experts 1, 5: 3 of 4096 values are NaN or infinite; also in 1 more: scale"
    )


def test_finite_missing_integer_empty_and_huge_tensors_are_no_alarm() -> None:
    huge = torch.full((1000,), 3e38)
    named = [
        ("none", None), ("ids", torch.arange(3)), ("empty", torch.zeros(0, 4)), ("huge", huge),
        ("half", torch.full((9,), 60000.0, dtype=torch.float16)), ("wide", torch.ones(2, dtype=torch.float64)),
        ("f8", torch.ones(4).to(torch.float8_e4m3fn)), ("complex", torch.ones(2, dtype=torch.complex64)),
    ]  # fmt: skip
    assert nonfinite_report(named) is None
    assert nonfinite_report([]) is None
    huge[7] = math.inf
    assert nonfinite_report(named) == "huge: 1 of 1000 values are infinite"


def test_the_loss_is_a_named_tensor_like_any_other() -> None:
    assert nonfinite_report([("loss", torch.tensor(math.nan))]) == "loss: 1 of 1 values are NaN"


@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_clipping_equals_torch(max_norm: float) -> None:
    params, twins = with_grads(), with_grads()
    for name, parameter in params.items():
        assert parameter.grad is not None
        twins[name].grad = parameter.grad.clone()
    report = clip_and_check(params.values(), max_norm)
    want = clip_grad_norm_(twins.values(), max_norm)
    assert report.finite
    assert report.norm == pytest.approx(float(want), rel=1e-6)
    for name, parameter in params.items():
        torch.testing.assert_close(parameter.grad, twins[name].grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_told_and_left_for_the_report(bad: float) -> None:
    params = with_grads()
    grad = params["layers.2.moe.experts.up_EDG"].grad
    assert grad is not None
    grad[6, 1, 1] = bad
    before = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    assert not clip_and_check(params.values(), 1.0).finite
    for name, p in params.items():
        torch.testing.assert_close(p.grad, before[name], rtol=0, atol=0, equal_nan=True)
    report = nonfinite_report((name, p.grad) for name, p in params.items())
    assert report is not None
    assert report.startswith("layers.2.moe.experts.up_EDG, expert 6: 1 of 4096")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_that_overflows_its_dtype_still_clips_exactly(dtype: torch.dtype) -> None:
    big = 1e30 if dtype != torch.float16 else 6e4
    parameter = nn.Parameter(torch.zeros(400, dtype=dtype))
    parameter.grad = torch.full((400,), big, dtype=dtype)
    report = clip_and_check([parameter], 2.0)
    assert report.finite
    assert report.norm == pytest.approx(20 * big, rel=1e-2)
    assert float(parameter.grad.double().norm()) == pytest.approx(2.0, rel=1e-2)


def test_no_gradients_at_all_is_a_norm_of_zero() -> None:
    report = clip_and_check([nn.Parameter(torch.ones(2))], 1.0)
    assert (report.norm, report.finite) == (0.0, True)


def run_rule(losses: list[float], rule: SpikeRule | None = None) -> list[int]:
    history: list[float] = []
    spikes = []
    for step, loss in enumerate(losses):
        found, history = is_spike(rule or SpikeRule(), history, loss)
        spikes += [step] if found else []
    assert len(history) <= 128
    assert json.loads(json.dumps(history)) == history
    return spikes


def test_a_spike_is_found_in_its_step_and_noise_is_not() -> None:
    draw = random.Random(3)
    losses = [3 + 2 * math.exp(-step / 100) + draw.gauss(0, 0.05) for step in range(1000)]
    assert run_rule(losses) == []
    for step in (500, 501, 502, 900):
        losses[step] += 1.0
    assert run_rule(losses) == [500, 501, 502, 900]


def test_a_lasting_change_of_level_is_accepted_in_time() -> None:
    draw = random.Random(4)
    losses = [draw.gauss(3 if step < 300 else 4, 0.05) for step in range(600)]
    spikes = run_rule(losses)
    assert spikes[0] == 300
    assert spikes[-1] < 350


def test_a_loss_that_is_not_finite_is_a_spike_and_leaves_the_history() -> None:
    for loss in (math.nan, math.inf):
        assert is_spike(SpikeRule(), [1.0, 2.0], loss) == (True, [1.0, 2.0])


def test_a_still_loss_is_not_a_spike() -> None:
    assert run_rule([2.0] * 200 + [2.001] * 5) == []


@given(st.lists(st.floats(-100, 100), max_size=200))
def test_a_loss_below_the_mean_is_never_a_spike(losses: list[float]) -> None:
    history: list[float] = []
    for loss in losses:
        mean = sum(history) / len(history) if history else loss
        found, history = is_spike(SpikeRule(warmup=2), history, loss)
        assert not (found and loss < mean)


def test_a_rule_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup=200 <= window=128"):
        SpikeRule(warmup=200)
    with pytest.raises(ConfigError, match="sigmas=0"):
        SpikeRule(sigmas=0.0)
