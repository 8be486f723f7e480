"""Every parameter has one group, experts and routers their own learning rates; the schedule rises, then falls."""

import itertools
from dataclasses import replace

import pytest
import torch

from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.models import Decoder
from turnout.routers import TopK
from turnout.train.optimizer import build_optimizer, lr_factor, set_lr
from turnout.train.recipe import OptimizerConfig, Recipe, ScheduleConfig


def test_every_parameter_is_in_one_group_with_its_own_rate_and_decay(small_recipe: Recipe) -> None:
    assert small_recipe.model.moe is not None
    moe_config = replace(small_recipe.model.moe, bias=True, router=TopK(k=2, bias=True))
    model = Decoder(replace(small_recipe.model, moe=moe_config))
    config = OptimizerConfig(lr=1e-3, expert_lr_scale=2.0, router_lr_scale=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    set_lr(optimizer, 0.5)
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    moe = model.moe_blocks()[0][1]
    for name, parameter in moe.experts.named_parameters():
        # what a step takes off a weight is rate times decay: for experts as much as for other matrices
        assert settings[id(parameter)] == (1e-3, 0.0 if "bias" in name else 0.05), name
    assert {settings[id(p)] for p in moe.router.parameters()} == {(0.25e-3, 0.0)}
    assert settings[id(model.embedding_VD)] == (0.5e-3, 0.1)
    assert settings[id(model.norm.weight_D)] == (0.5e-3, 0.0)


def test_the_schedule_rises_linearly_and_falls_to_its_final_share() -> None:
    config = ScheduleConfig(warmup=0.1, final=0.05)
    factors = [lr_factor(i / 1000, config) for i in range(1001)]
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(factors[100:]))
    assert min(factors) > 0


def test_a_step_moves_each_part_at_its_own_rate(small_recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = Decoder(small_recipe.model)
    router = model.moe_blocks()[0][1].router
    before = {name: p.detach().clone() for name, p in router.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, router_lr_scale=0.1, weight_decay=0.0))
    set_lr(optimizer, 1.0)
    tokens = torch.randint(300, (2, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    optimizer.step()
    moved = max((p.detach() - before[name]).abs().max().item() for name, p in router.named_parameters())
    # the first step of Adam moves every weight by its learning rate
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "clip"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_a_setting_without_bounds_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.{name}={value} must be"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("dim", [3, 5, 16])
def test_an_expert_with_copies_takes_the_same_step_wherever_it_lies(dim: int) -> None:
    """torch's fused step rounds the last numbers of a tensor otherwise than those before them."""
    torch.manual_seed(0)
    number = FFNExperts(dim, 3, 1, bias=True)
    found = []
    for experts, row in ((1, 0), (3, 0), (3, 1), (4, 3)):
        model = FFNExperts(dim, 3, experts, bias=True)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight[row] = number.get_parameter(name)[0]
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2), has_copies=True)
        for step in range(4):
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(experts))
                own = torch.randn(weight.shape[1:], generator=torch.Generator().manual_seed(step))
                weight.grad[row] = own
            optimizer.step()
        found.append([weight.detach()[row] for weight in model.parameters()])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
