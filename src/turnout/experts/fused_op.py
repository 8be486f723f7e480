"""The kernel as an operator that torch.compile knows: one node, whose shapes do not hang on the routing."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from turnout.kernels import Gradients, Kernel, Routing, Weights, trusted_kernel
from turnout.kernels.half_proof import prove_half
from turnout.kernels.matrix_unit import trusted_by_matrix_unit
from turnout.kernels.proof import prove
from turnout.tensors import Assignment

# weights of one product of an expert in float32; of fewer, packing in parts takes longer than the matrix unit spares
LEAST_IN_PARTS = 1 << 15


@torch.library.custom_op("turnout::fused_experts", mutates_args=(), device_types="cpu")
def fused_experts(
    x_TD: Tensor,
    weight_N: Tensor,
    up_EDG: Tensor,
    down_EFD: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    expert_N: Tensor,
    keep_N: Tensor | None,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_TD; what the backward pass wants to have back, with room for every assignment; the routes."""
    kernel = the_kernel(x_TD.dtype, down_EFD)
    weights = kernel_weights(up_EDG, down_EFD, up_bias_EG, down_bias_ED, kind)
    assignment = Assignment(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weight_N,
        choice_N=token_N,
        num_tokens=len(x_TD),
        num_experts=len(up_EDG),
    )
    routing = kernel.sort(assignment, keep_N)
    saved_rows = len(expert_N) if keep else None
    y_TD, saved = kernel.forward(x_TD.contiguous(), weight_N.contiguous(), weights, routing, saved_rows=saved_rows)
    return y_TD, x_TD.new_empty(0) if saved is None else saved, routing.routes


@fused_experts.register_fake
def _(
    x_TD: Tensor,
    weight_N: Tensor,
    up_EDG: Tensor,
    down_EFD: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    expert_N: Tensor,
    keep_N: Tensor | None,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num, num_routes = len(expert_N), 3 + len(up_EDG) + len(x_TD) + 3 * len(expert_N)
    size = (
        the_kernel(x_TD.dtype, down_EFD).saved_size(kernel_weights(up_EDG, down_EFD, None, None, kind), num, x_TD.dtype)
        if keep
        else 0
    )
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    return y_TD, x_TD.new_empty(size), expert_N.new_empty(num_routes, dtype=torch.int32)


@torch.library.custom_op("turnout::fused_experts_backward", mutates_args=(), device_types="cpu")
def fused_experts_backward(
    y_grad_TD: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    up_EDG: Tensor,
    down_EFD: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    saved: Tensor,
    routes: Tensor,
    kind: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of those of the first six inputs of the forward pass that are wanted."""
    weights = kernel_weights(up_EDG, down_EFD, up_bias_EG, down_bias_ED, kind)
    # the number of rows stands at the end of the experts' starts
    routing = Routing(
        routes=routes,
        num_rows=int(routes[1 + len(up_EDG)]),
        num_tokens=len(x_TD),
        num_experts=len(up_EDG),
        num_assignments=len(weight_N),
    )
    kernel, rows = the_kernel(x_TD.dtype, down_EFD), (y_grad_TD.contiguous(), x_TD.contiguous())
    found = kernel.backward(*rows, weight_N.contiguous(), weights, routing, saved, wanted=tuple(wanted))
    return [grad for grad in in_dtypes_of(weights, found) if grad is not None]


@fused_experts_backward.register_fake
def _(
    y_grad_TD: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    up_EDG: Tensor,
    down_EFD: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    saved: Tensor,
    routes: Tensor,
    kind: str,
    wanted: list[bool],
) -> list[Tensor]:
    return empty_gradients((x_TD, weight_N, up_EDG, down_EFD, up_bias_EG, down_bias_ED), wanted)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, kind, _ = inputs
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.kind = kind


def _backward(ctx: Any, y_grad_TD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    found = fused_experts_backward(y_grad_TD, *ctx.saved_tensors, ctx.kind, wanted)
    return (*at_wanted(found, wanted), None, None, None, None, None)


fused_experts.register_autograd(_backward, setup_context=_remember)


def the_kernel(rows: torch.dtype, down_EFD: Tensor) -> Kernel:
    """The kernel of a backend that did not refuse, for rows of that dtype and experts of that size.

    Not for how many rows: what a model computes would hang on its batch.
    """
    if rows == torch.bfloat16:
        kernel = half_by_matrix_unit()
    elif math.prod(down_EFD.shape[1:]) < LEAST_IN_PARTS:
        kernel = trusted_kernel()
    else:
        unit = float_by_matrix_unit()
        kernel = unit if isinstance(unit, Kernel) else trusted_kernel()
    assert isinstance(kernel, Kernel)
    return kernel


@functools.cache
def float_by_matrix_unit() -> Kernel | str:
    """The kernel whose pass in float32, by the processor's matrix unit, is proven; or why there is none."""
    return trusted_by_matrix_unit(prove, ".float-amx-proven")


@functools.cache
def half_by_matrix_unit() -> Kernel | str:
    """The kernel whose pass in bfloat16, by the processor's matrix unit, is proven; or why there is none."""
    return trusted_by_matrix_unit(prove_half, ".bf16-amx-proven")


def kernel_weights(
    up_EDG: Tensor, down_EFD: Tensor, up_bias_EG: Tensor | None, down_bias_ED: Tensor | None, kind: str
) -> Weights:
    """The weights as the kernel reads them: contiguous."""
    biases = (None if bias is None else bias.contiguous() for bias in (up_bias_EG, down_bias_ED))
    up_bias, down_bias = biases
    return Weights(
        up_EDG=up_EDG.contiguous(),
        down_EFD=down_EFD.contiguous(),
        up_bias_EG=up_bias,
        down_bias_ED=down_bias,
        kind=kind,
    )


def empty_gradients(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """Room for the gradients of those inputs that are wanted: what an operator gives, without its values."""
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, is_wanted in zip(inputs, wanted, strict=True)
        if is_wanted and tensor is not None
    ]


def at_wanted(found: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients at the places of their inputs, None elsewhere."""
    following = iter(found)
    return [next(following) if is_wanted else None for is_wanted in wanted]


def in_dtypes_of(weights: Weights, found: Gradients) -> Gradients:
    """The kernel writes the gradients of matrices in float32; an optimizer wants those of bfloat16 ones in theirs."""
    up, down = found.up_EDG, found.down_EFD
    return found._replace(
        up_EDG=None if up is None else up.to(weights.up_EDG.dtype),
        down_EFD=None if down is None else down.to(weights.down_EFD.dtype),
    )
