"""The optimizer of a recipe, and its learning rate over the run."""

import math

from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor

from turnout.contracts import Router
from turnout.experts import FFNExperts, ModuleExperts
from turnout.train.recipe import OptimizerConfig, ScheduleConfig

# numbers that a processor takes at once, of the narrowest kind: what is left at the end of a tensor rounds otherwise
_WIDEST = 64


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, has_copies: bool = False) -> optim.AdamW:
    """Fused AdamW; experts and routers learn at rates of their own; routers, biases, norms and vectors do not decay.

    Decay shrinks experts as fast as other matrices, whatever their rate: AdamW multiplies it by the rate.
    Each group keeps its peak learning rate under `peak_lr`. Shards over other ranks are in other groups: one call of
    the fused step takes no two kinds.
    With `has_copies` other ranks hold copies of experts, which lie elsewhere in tensors there and must stay the same to
    the bit. torch's fused step on CPUs rounds the last numbers of a tensor otherwise than the rest, so it is then left
    where weights of an expert do not fill whole registers.
    """
    experts = _ids_in(model, (FFNExperts, ModuleExperts))
    routers = _ids_in(model, (Router,))
    groups: dict[tuple[float, float, object], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if id(parameter) in routers:
            scale = config.router_lr_scale
        elif id(parameter) in experts:
            scale = config.expert_lr_scale
        # stacked over experts, a bias has two axes
        is_matrix = parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]
        decay = config.weight_decay / scale if is_matrix and id(parameter) not in routers else 0.0
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((config.lr * scale, decay, mesh), []).append(parameter)
    return optim.AdamW(
        [{"params": members, "weight_decay": decay, "peak_lr": lr} for (lr, decay, _), members in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=not (has_copies and any(p[0].numel() % _WIDEST for p in model.parameters() if id(p) in experts)),
    )


def _ids_in(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    return {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}


def lr_factor(progress: float, config: ScheduleConfig) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: linear warm-up, then a cosine to `final`."""
    if progress < config.warmup:
        # the first step already learns
        return max(progress / config.warmup, 0.01)
    share = min(1.0, (progress - config.warmup) / max(1.0 - config.warmup, 1e-9))
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * share))


def set_lr(optimizer: optim.Optimizer, factor: float) -> float:
    """Give every group `factor` of its peak; returns the first group's rate, that of the embedding: optimizer.lr's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]
