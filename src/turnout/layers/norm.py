"""Root-mean-square and layer normalisation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.registry import Table
from turnout.tensors import first_order

NORMS: Table[Callable[..., nn.Module]] = Table("norm")


@NORMS.register("rms")
class RMSNorm(nn.Module):
    """x / rms(x) * weight, in at least float32. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight_D = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight_D)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., D); returns the same."""
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight_D.shape, self.weight_D, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        # without gradients, as token by token in generation, the autograd function costs more than the norm
        norm = _FusedRMSNorm.apply if torch.is_grad_enabled() else _rms_norm
        return norm(x.to(wide), self.weight_D.to(wide), self.eps).to(x.dtype)


@NORMS.register("layer")
class LayerNorm(nn.Module):
    """Layer normalisation with weight and bias."""

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight_D = nn.Parameter(torch.empty(dim))
        self.bias_D = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight_D)
        nn.init.zeros_(self.bias_D)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., D); returns the same."""
        return F.layer_norm(x, self.weight_D.shape, self.weight_D, self.bias_D, self.eps)


class _FusedRMSNorm(torch.autograd.Function):
    """torch's own on CPU is a chain of a dozen passes over memory, 2-3 times slower than this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D, scale = ctx.saved_tensors
        grad = grads[0] * scale
        grad_weight_D = (grad * x).flatten(0, -2).sum(dim=0)
        grad.mul_(weight_D)
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1).mul_(scale.square()).div_(-x.shape[-1])
        return grad.addcmul_(x, along), grad_weight_D, None


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return (x * _inverse_rms(x, eps)).mul_(weight_D)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
