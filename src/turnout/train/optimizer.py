"""The optimizer of a recipe, and its learning rate over the run."""

import math

from torch import Tensor, nn, optim

from turnout.contracts import Router
from turnout.experts import FFNExperts, ModuleExperts
from turnout.train.recipe import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.AdamW:
    """Fused AdamW over other matrices, routed experts, routers and vectors; routers and vectors do not decay.

    Each group keeps its peak learning rate under `peak_lr`.
    """
    experts = _parameters_in(model, (FFNExperts, ModuleExperts))
    routers = _parameters_in(model, (Router,))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in {id(q) for q in (*experts, *routers)}]
    matrices, vectors = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "peak_lr": config.lr},
        {"params": experts, "weight_decay": config.weight_decay, "peak_lr": config.lr * config.expert_lr_scale},
        {"params": routers, "weight_decay": 0.0, "peak_lr": config.lr * config.router_lr_scale},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": config.lr},
    ]
    return optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def _parameters_in(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Tensor]:
    found = {id(p): p for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    return [p for p in found.values() if p.requires_grad]


def lr_factor(progress: float, config: ScheduleConfig) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: linear warm-up, then a cosine to `final`."""
    if progress < config.warmup:
        # the first step already learns
        return max(progress / config.warmup, 0.01)
    share = min(1.0, (progress - config.warmup) / max(1.0 - config.warmup, 1e-9))
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * share))


def set_lr(optimizer: optim.Optimizer, factor: float) -> None:
    """Give every group `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
