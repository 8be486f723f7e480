"""The layers of the papers: each has the settings its paper prints, and each learns."""

import inspect
from collections.abc import Callable

import pytest
import torch

from turnout import MoE, presets, total_loss
from turnout.dispatch import Dropless, FixedCapacity
from turnout.losses import LoadBalance, RouterZ
from turnout.routers import GShardTop2, Switch, TopK

PRESETS = [
    value
    for name, value in sorted(vars(presets).items())
    if inspect.isfunction(value) and value.__module__ == presets.__name__
]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains_one_step(preset: Callable[..., MoE]) -> None:
    torch.manual_seed(0)
    layer = preset(16, 12, 8)
    x, target = torch.randn(2, 24, 16), torch.randn(2, 24, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)

    def step() -> float:
        out = layer(x, generator=torch.Generator().manual_seed(0))
        loss = (out.y - target).square().mean() + total_loss(out.losses)
        optimizer.zero_grad()
        loss.backward()
        return loss.item()

    before = step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert all(p.grad is not None and p.grad.any() for p in layer.router.parameters())
    optimizer.step()
    assert step() < before


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_its_source(preset: Callable[..., MoE]) -> None:
    assert "Source: " in (inspect.getdoc(preset) or "")
    assert "arXiv:" in (inspect.getdoc(preset) or "")


def test_gshard_has_the_settings_of_the_paper() -> None:
    config = presets.gshard(8, 16, 4).config
    assert isinstance(config.router, GShardTop2)
    assert config.router.second_expert == "random"
    assert config.expert == "relu"
    assert config.losses == (LoadBalance(coefficient=0.01, count="first"),)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(64, 4), (256, 16), (10, 4), (7, 3)])
def test_gshard_capacity_is_two_s_over_e(num_tokens: int, num_experts: int) -> None:
    capacity = presets.gshard(8, 16, num_experts).config.capacity
    assert isinstance(capacity, FixedCapacity)
    assert capacity.rows(2 * num_tokens, num_experts) == -(-2 * num_tokens // num_experts)


def test_switch_has_the_settings_of_the_paper() -> None:
    config = presets.switch(8, 16, 4).config
    assert config.router == Switch(jitter=0.01)
    assert config.capacity == FixedCapacity(factor=1.25)
    assert config.expert == "relu"
    assert config.losses == (LoadBalance(coefficient=0.01),)


@pytest.mark.parametrize(
    ("preset", "renormalize", "k", "num_experts"),
    [
        (presets.mixtral, True, 2, 8),
        (presets.olmoe, False, 8, 64),
        (presets.qwen3_moe, True, 8, 128),
        (presets.deepseek_moe, False, 6, 64),
    ],
)
def test_dropless_presets_differ_where_their_papers_do(
    preset: Callable[..., MoE], renormalize: bool, k: int, num_experts: int
) -> None:
    config = preset(4, 2).config
    assert config.router == TopK(k=k, renormalize=renormalize)
    assert (config.num_experts, config.capacity, config.expert, config.bias) == (
        num_experts,
        Dropless(),
        "swiglu",
        False,
    )


def test_qwen3_counts_load_over_the_global_batch_and_olmoe_adds_the_z_loss() -> None:
    assert presets.qwen3_moe(4, 2).config.losses == (LoadBalance(coefficient=0.001, scope="global"),)
    assert presets.olmoe(4, 2).config.losses == (LoadBalance(coefficient=0.01), RouterZ(coefficient=0.001))


def test_shared_experts_side_by_side_are_one_wider_expert() -> None:
    """Why `deepseek_moe` may compute its two shared experts as one."""
    shared = presets.deepseek_moe(6, 5, 8, k=2).double().shared
    assert shared is not None
    x_TD = torch.randn(7, 6, dtype=torch.float64)
    gate_2FD, up_2FD = shared.up_GD.chunk(2)
    halves = [
        (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
        for gate, up, down in zip(gate_2FD.split(5), up_2FD.split(5), shared.down_DF.split(5, dim=1), strict=True)
    ]
    assert torch.allclose(shared(x_TD), torch.stack(halves).sum(dim=0), rtol=0, atol=1e-14)
