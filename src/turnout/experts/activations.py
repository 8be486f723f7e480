"""Activations between the two matrices of an expert; a gated one halves its input's width."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.kernels import KINDS
from turnout.registry import Table
from turnout.tensors import first_order


class Activation(ABC):
    """h = act(up) for rows of width G; G is F, or 2F when `gated` (gate first, then up)."""

    TABLE: ClassVar[Table["Activation"]] = Table("expert kind")
    gated: ClassVar[bool]

    @abstractmethod
    def __call__(self, up_MG: Tensor) -> Tensor:
        """Shapes: up_MG (..., G); returns (..., F)."""


class Differentiated(Activation):
    """One that knows its own derivative, where autograd would keep books and take new memory for each expert."""

    @abstractmethod
    def backward(self, up_MG: Tensor, h_grad_MF: Tensor) -> tuple[Tensor, Tensor]:
        """h once more, and the gradient before the activation, which may lie where `h_grad_MF` was.

        Shapes: up_MG (..., G) and h_grad_MF (..., F) contiguous; returns (..., F) and (..., G).
        """


def kernels_failure(backend: str, kind: str, own: object) -> str:
    """Why kernels cannot compute experts of that kind, whose activation is `own`; or nothing."""
    if kind not in KINDS:
        return f"{backend} has no activation {kind!r}, only {', '.join(KINDS)}"
    if type(own) is not type(Activation.TABLE[kind]):
        return f"{backend} computes {kind}, and these experts have another activation in its place"
    return ""


class _ReLU(Differentiated):
    gated = False

    def __call__(self, up_MG: Tensor) -> Tensor:
        return F.relu(up_MG)

    def backward(self, up_MG: Tensor, h_grad_MF: Tensor) -> tuple[Tensor, Tensor]:
        h_MF = F.relu(up_MG)
        return h_MF, torch.ops.aten.threshold_backward.grad_input(h_grad_MF, h_MF, 0, grad_input=h_grad_MF)


class _GELU(Differentiated):
    gated = False

    def __call__(self, up_MG: Tensor) -> Tensor:
        return F.gelu(up_MG)

    def backward(self, up_MG: Tensor, h_grad_MF: Tensor) -> tuple[Tensor, Tensor]:
        return F.gelu(up_MG), torch.ops.aten.gelu_backward.grad_input(h_grad_MF, up_MG, grad_input=h_grad_MF)


class _SwiGLU(Differentiated):
    """silu(gate) * up. Source: Shazeer 2020, arXiv:2002.05202."""

    gated = True

    def __call__(self, up_MG: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # which finds both by itself, and takes no gradients written into halves
            gate, up = up_MG.chunk(2, dim=-1)
            return F.silu(gate) * up
        return _FusedSwiGLU.apply(up_MG)

    def backward(self, up_MG: Tensor, h_grad_MF: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = up_MG.chunk(2, dim=-1)
        grad_MG = torch.empty_like(up_MG)
        grad_gate, grad_up = grad_MG.chunk(2, dim=-1)
        h_MF = F.silu(gate)
        torch.mul(h_grad_MF, h_MF, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(h_grad_MF.mul_(up), gate, grad_input=grad_gate)
        return h_MF.mul_(up), grad_MG


class _ClampedSwiGLU(Activation):
    """GPT-OSS: gate * sigmoid(1.702 gate) * (up + 1), gate clamped above at 7, up to [-7, 7]."""

    gated = True

    def __call__(self, up_MG: Tensor) -> Tensor:
        gate, up = up_MG.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class _FusedSwiGLU(torch.autograd.Function):
    """Saves only its input, and writes the gradients of both halves into one buffer."""

    @staticmethod
    def forward(ctx: Any, up_MG: Tensor) -> Tensor:
        ctx.save_for_backward(up_MG)
        gate, up = up_MG.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (up_MG,) = ctx.saved_tensors
        gate, up = up_MG.chunk(2, dim=-1)
        grad_MG = torch.empty_like(up_MG)
        grad_gate, grad_up = grad_MG.chunk(2, dim=-1)
        scratch = grads[0] * up
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=scratch)
        torch.mul(scratch, grads[0], out=grad_up)
        return grad_MG


Activation.TABLE.register("relu")(_ReLU())
Activation.TABLE.register("gelu")(_GELU())
Activation.TABLE.register("swiglu")(_SwiGLU())
Activation.TABLE.register("swiglu_clamped")(_ClampedSwiGLU())
