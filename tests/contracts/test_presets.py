"""The layers of the papers: each has the settings its paper prints, and each learns."""

import inspect
from collections.abc import Callable

import pytest
import torch

from turnout import MoE, presets, total_loss
from turnout.dispatch import Dropless, FixedCapacity, TutelCapacity
from turnout.losses import LoadBalance, Locality, RouterZ
from turnout.routers import DeepSeekV3, GShardTop2, Switch, TopK

PRESETS = [
    value
    for name, value in sorted(vars(presets).items())
    if inspect.isfunction(value) and value.__annotations__["return"] is MoE
]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains_one_step(preset: Callable[..., MoE]) -> None:
    torch.manual_seed(0)
    layer = preset(16, 12, *([] if "num_experts" in _defaults(preset) else [8]))
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


def _defaults(preset: Callable[..., MoE]) -> set[str]:
    return {name for name, p in inspect.signature(preset).parameters.items() if p.default is not p.empty}


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


def test_deepseek_v3_balances_by_bias_and_by_sequence() -> None:
    config = presets.deepseek_v3(4, 2).config
    assert config.router == DeepSeekV3(k=8, groups=8, top_groups=4, scale=2.5, bias_step=0.001)
    assert config.losses == (LoadBalance(coefficient=1e-4, scope="sequence"),)
    assert (config.num_experts, config.shared_hidden) == (256, 2)


def test_tutel_changes_k_and_capacity_from_call_to_call() -> None:
    layer, x = presets.tutel(8, 4, 4), torch.randn(1, 64, 8)
    assert layer.config.capacity == TutelCapacity(factor=1.0)
    assert int(layer(x, top_k=3).stats.assigned_E.sum()) == 3 * 64
    assert int(layer(x, capacity_factor=0).stats.dropped_capacity_E.sum()) == 0


def test_locmoe_draws_a_node_to_its_own_experts() -> None:
    for preset in (presets.locmoe, presets.locmoe_plus):
        layer = preset(8, 4, 4, local=(2, 3))
        assert layer.config.losses[1] == Locality(coefficient=0.01, local=(2, 3))
        assert layer.config.expert == "gelu"
    assert presets.locmoe(8, 4, 4, minimum=3).config.capacity == FixedCapacity(factor=1.1, minimum=3)


def test_expert_choice_leaves_no_expert_idle() -> None:
    assert (presets.expert_choice(8, 4, 4)(torch.randn(1, 32, 8)).stats.assigned_E == 16).all()


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
