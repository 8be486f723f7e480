"""Grouped matrix multiplication: the one wrapper around torch's `grouped_mm`, owning its traps.

No other file calls it. Measured on torch 2.11 and 2.13: float64 is rejected; every stride must be a multiple of
16 bytes; the backward of float32 rejects an expanded gradient; rows past the last offset are unspecified on
CUDA; bias, mixed dtypes and autocast are not handled; under torch.compile fake tensors exist for bf16 only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.contracts import ExpertBackend, Refusal
from turnout.experts.weights import FFNExperts
from turnout.tensors import Ragged, Rows, first_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mm(x_MD: Tensor, weight_EDG: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of expert e times weight e, for rows laid expert by expert; differentiable in both.

    The weight is cast to the dtype of the rows. An expert without rows gets a gradient of exactly zero.
    Shapes: x_MD (M, D) with M = counts_E.sum(); weight_EDG (E, D, G); counts_E (E,); returns (M, G).
    """
    return _GroupedMM.apply(x_MD, weight_EDG.to(x_MD.dtype), counts_E.cumsum(0).to(torch.int32))


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_EDG: Tensor, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, weight_EDG, end_E)
        return _rows_by_matrix(x_MD, weight_EDG, end_E)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, weight_EDG, end_E = ctx.saved_tensors
        (grad_MG,) = grads
        grad_x = _rows_by_matrix(grad_MG, weight_EDG.transpose(1, 2), end_E) if ctx.needs_input_grad[0] else None
        grad_weight = _rows_by_rows(x_MD, grad_MG, end_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _rows_by_matrix(x_MD: Tensor, weight_EDG: Tensor, end_E: Tensor) -> Tensor:
    num_columns = weight_EDG.shape[2]
    x_MD, weight_EDG = _aligned(x_MD, dims=(1,)), _aligned(weight_EDG, dims=(1, 2))
    return F.grouped_mm(x_MD, weight_EDG, offs=end_E)[:, :num_columns]


def _rows_by_rows(x_MD: Tensor, grad_MG: Tensor, end_E: Tensor) -> Tensor:
    """x_e^T grad_e for every expert: (E, D, G)."""
    dim, num_columns = x_MD.shape[1], grad_MG.shape[1]
    x_MD, grad_MG = _aligned(x_MD, dims=(1,)), _aligned(grad_MG, dims=(1,))
    return F.grouped_mm(x_MD.t(), grad_MG, offs=end_E)[:, :dim, :num_columns]


def _aligned(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    """`x` with `dims` zero-padded to 16 bytes and laid out so that every stride is a multiple of them.

    That also lays out an expanded gradient, as of y.sum(), whose strides of 0 the backward of float32 rejects.
    """
    step = 16 // x.element_size()
    pads = {dim: -x.shape[dim] % step for dim in dims}
    if any(pads.values()):
        flat = [amount for dim in reversed(range(x.ndim)) for amount in (0, pads.get(dim, 0))]
        return F.pad(x, flat)
    inner = sorted(x.stride())
    fits = inner[0] == 1 and all(stride % step == 0 for stride in inner[1:]) and x.data_ptr() % 16 == 0
    # contiguous() keeps a tensor of one row as it is, whatever its stride, and memory that starts off the boundary
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class GroupedMM(ExpertBackend):
    """Two grouped matmuls and the activation between them; no host copy of the counts."""

    layout = "ragged"

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        if not isinstance(experts, FFNExperts):
            return Refusal(reason="grouped_mm computes feed-forward experts; modules of your own need backend='loop'")
        if dtype not in DTYPES:
            return Refusal(reason=f"torch's grouped_mm has no {dtype}; use backend='loop'")
        if device.type == "cuda" and dtype != torch.bfloat16:
            return Refusal(
                reason=f"torch's grouped_mm on CUDA computes bfloat16 only, not {dtype}; use backend='padded_bmm'"
            )
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            return Refusal(
                reason=f"torch.compile knows grouped_mm for bfloat16 only, not {dtype}; use backend='padded_bmm'"
            )
        return None

    def run(self, experts: nn.Module, rows: Rows) -> Rows:
        assert isinstance(rows, Ragged)
        assert isinstance(experts, FFNExperts)
        up_MG = _with_bias(grouped_mm(rows.x_MD, experts.up_EDG, rows.counts_L), experts.up_bias_EG, rows)
        y_MD = grouped_mm(experts.activation(up_MG), experts.down_EFD, rows.counts_L)
        return Ragged(x_MD=_with_bias(y_MD, experts.added_bias_ED, rows), counts_L=rows.counts_L)


def _with_bias(y_MG: Tensor, bias_EG: Tensor | None, rows: Ragged) -> Tensor:
    if bias_EG is None:
        return y_MG
    return y_MG + bias_EG.to(y_MG.dtype).repeat_interleave(rows.counts_L, dim=0, output_size=len(y_MG))


ExpertBackend.TABLE.register("grouped_mm")(GroupedMM())
