"""One optimizer step: micro-batches add up to the batch, and a bad one changes nothing."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from turnout.data.prepare import Dataset
from turnout.data.sampler import Batch, Sampler
from turnout.layers import MoE
from turnout.models import Decoder, presets
from turnout.train.device import autocast_for, compute_dtype
from turnout.train.estimate import memory_here, seconds_per_step
from turnout.train.optimizer import build_optimizer
from turnout.train.recipe import Recipe
from turnout.train.step import StepResult, train_step

CPU = torch.device("cpu")


def step(model: Decoder, recipe: Recipe, batches: list[Batch]) -> StepResult:
    optimizer = build_optimizer(model, recipe.optimizer)
    autocast = autocast_for(CPU, torch.float32)
    return train_step(model, model.loss, optimizer, batches, max_norm=1.0, autocast=autocast)


@pytest.fixture
def batches(small_dataset: Dataset) -> list[Batch]:
    sampler = Sampler(small_dataset.train, 2, 16, 0)
    return [sampler.next_batch() for _ in range(4)]


def test_micro_batches_add_up_to_the_whole_batch(small_recipe: Recipe, batches: list[Batch]) -> None:
    dense = replace(small_recipe.model, moe=None, hidden=16)
    whole, parts = Decoder(dense).double(), Decoder(dense).double()
    parts.load_state_dict(whole.state_dict())
    joined = Batch(
        tokens_BS=torch.cat([b.tokens_BS for b in batches]), targets_BS=torch.cat([b.targets_BS for b in batches])
    )
    at_once, in_parts = step(whole, small_recipe, [joined]), step(parts, small_recipe, batches)
    assert in_parts.loss == pytest.approx(at_once.loss, rel=1e-12)
    assert in_parts.grad_norm == pytest.approx(at_once.grad_norm, rel=1e-10)
    for (name, want), got in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9, msg=name)


def test_statistics_of_micro_batches_are_summed(small_recipe: Recipe, batches: list[Batch]) -> None:
    result = step(Decoder(small_recipe.model), small_recipe, batches)
    num_tokens = sum(batch.tokens_BS.numel() for batch in batches)
    for stats in result.stats:
        assert int(stats.num_routed) == num_tokens
        assert int(stats.assigned_E.sum()) == 2 * num_tokens


def test_a_step_that_is_not_finite_changes_nothing(small_recipe: Recipe, batches: list[Batch]) -> None:
    model = Decoder(small_recipe.model)
    before = deepcopy(model.state_dict())
    model.embedding_VD.register_hook(lambda grad: grad * torch.nan)
    result = step(model, small_recipe, batches)
    assert result.problem is not None
    assert "embedding_VD" in result.problem
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_measuring_a_step_leaves_the_random_state_alone(small_recipe: Recipe) -> None:
    before = torch.get_rng_state()
    assert seconds_per_step(small_recipe, CPU) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert memory_here(CPU) > 1 << 28


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_the_compiled_layer_of_tiny_gives_what_the_layer_gives(dtype: torch.dtype) -> None:
    moe = presets.tiny().moe
    assert moe is not None
    torch.manual_seed(0)
    plain = MoE.from_config(32, replace(moe, num_experts=4, hidden=16, shared_hidden=16)).to(dtype)
    compiled = deepcopy(plain)
    x_TD, ids_T = torch.randn(24, 32, dtype=dtype), torch.randint(32, (24,))
    answers = []
    for layer in (plain, torch.compile(compiled, backend="eager")):
        y_TD = layer(x_TD, token_ids=ids_T).y
        y_TD.square().sum().backward()
        answers.append(y_TD.detach())
    torch.testing.assert_close(answers[1], answers[0])
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("has_units", "width", "precision", "chosen"),
    [
        (True, 512, "auto", torch.bfloat16),
        (True, 256, "auto", torch.float32),
        (False, 512, "auto", torch.float32),
        (False, 256, "bfloat16", torch.bfloat16),
        (True, 512, "float32", torch.float32),
    ],
)
def test_a_processor_takes_bfloat16_by_itself_only_for_wide_matrices(
    small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    has_units: bool,
    width: int,
    precision: str,
    chosen: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_units)
    model = replace(small_recipe.model, dim=width, moe=None, hidden=1024)
    recipe = replace(small_recipe, model=model, loop=replace(small_recipe.loop, precision=precision))
    assert compute_dtype(torch.device("cpu"), recipe) == chosen
    narrow = replace(recipe, model=replace(model, hidden=width // 2))
    if precision == "auto":
        assert compute_dtype(torch.device("cpu"), narrow) == torch.float32
