"""The optimizer of a recipe, and its learning rate over the run."""

import math
from collections.abc import Iterable

from torch import Tensor, nn, optim

from turnout.experts import FFNExperts, ModuleExperts
from turnout.train.recipe import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.AdamW:
    """Fused AdamW over three groups: routed experts, other matrices, and vectors, which do not decay.

    Each group keeps its peak learning rate under `peak_lr`.
    """
    expert_ids = {id(p) for m in model.modules() if isinstance(m, FFNExperts | ModuleExperts) for p in m.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    experts = [p for _, p in named if id(p) in expert_ids]
    matrices = [p for _, p in named if id(p) not in expert_ids and p.ndim > 1]
    vectors = [p for _, p in named if id(p) not in expert_ids and p.ndim <= 1]
    scaled = config.lr * config.expert_lr_scale
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "peak_lr": config.lr},
        {"params": experts, "weight_decay": config.weight_decay, "peak_lr": scaled},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": config.lr},
    ]
    return optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


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


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that are there."""
    return [p.grad for p in parameters if p.grad is not None]
