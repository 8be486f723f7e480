"""The Triton kernels as an operator that torch.compile knows: one node, whose shapes do not hang on the routing."""

from typing import Any

import torch
from torch import Tensor

from turnout.experts.fused_op import at_wanted, empty_gradients, kernel_weights
from turnout.kernels.arguments import Gradients, Weights
from turnout.kernels.gpu import launcher
from turnout.kernels.gpu.configs import Config
from turnout.kernels.gpu.tuned import config_for, shape_of, size_of
from turnout.tensors import first_order

Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("turnout::triton_experts", mutates_args=())
def triton_experts(
    x_TD: Tensor,
    weight_N: Tensor,
    up_EDG: Tensor,
    down_EFD: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    expert_N: Tensor,
    keep_N: Tensor | None,
    count_BE: Tensor | None,
    kind: str,
    top_k: int,
    keep: bool,
) -> Eight:
    """y_TD; with `keep` what was before the activation; the routes.

    `top_k`: choices of each token, which then lie side by side; 0 where tokens differ in their number. `count_BE`:
    what the router's kernel counted of them.
    Bit for bit the same each time: a token's rows are written first and then added up by one program, in their order.
    Compared with atomic additions that is one write and one read of (N, D) more.
    """
    weights = kernel_weights(up_EDG, down_EFD, up_bias_EG, down_bias_ED, kind)
    config = _config(weights, x_TD, len(weight_N))
    with torch.cuda.device_of(x_TD):
        y_TD, up_MG, routes = launcher().forward(
            x_TD.contiguous(),
            weight_N.contiguous(),
            token_N.contiguous(),
            expert_N.contiguous(),
            keep_N,
            weights,
            config,
            top_k=top_k,
            keep=keep,
            count_BE=count_BE,
        )
    return y_TD, up_MG, *routes


@triton_experts.register_fake
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
    count_BE: Tensor | None,
    kind: str,
    top_k: int,
    keep: bool,
) -> Eight:
    num = len(expert_N)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    up_MG = x_TD.new_empty(num if keep else 0, up_EDG.shape[2])
    sizes = ((num,), (num,), (num,), (2, len(up_EDG) + 1), (0 if top_k else num,), (0 if top_k else len(x_TD) + 1,))
    row_N, token_M, assignment_M, start_2E, order_N, offset_T = (
        expert_N.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return y_TD, up_MG, row_N, token_M, assignment_M, start_2E, order_N, offset_T


@torch.library.custom_op("turnout::triton_experts_backward", mutates_args=())
def triton_experts_backward(
    y_grad_TD: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    up_EDG: Tensor,
    down_EFD: Tensor,
    up_bias_EG: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    up_MG: Tensor,
    routes: list[Tensor],
    kind: str,
    top_k: int,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of those of the first six inputs of the forward pass that are wanted, each in its own dtype.

    A matrix is written once, in the fixed order of its rows; zeros for an expert without rows.
    """
    weights = kernel_weights(up_EDG, down_EFD, up_bias_EG, down_bias_ED, kind)
    config = _config(weights, x_TD, len(weight_N))
    with torch.cuda.device_of(x_TD):
        found: Gradients = launcher().backward(
            y_grad_TD.contiguous(),
            x_TD.contiguous(),
            weight_N.contiguous(),
            token_N.contiguous(),
            weights,
            launcher().Routes(*routes),
            up_MG,
            config,
            top_k=top_k,
            wanted=tuple(wanted),
        )
    return [grad for grad in found if grad is not None]


@triton_experts_backward.register_fake
def _(y_grad_TD: Tensor, *inputs: Any) -> list[Tensor]:
    return empty_gradients(inputs[:6], wanted=inputs[-1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, kind, top_k, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.kind, ctx.top_k = kind, top_k


def _backward(ctx: Any, y_grad_TD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, up_MG = ctx.saved_tensors[:8]
    wanted = list(ctx.needs_input_grad[:6])
    routes = list(ctx.saved_tensors[8:])
    found = triton_experts_backward(y_grad_TD, *tensors, up_MG, routes, ctx.kind, ctx.top_k, wanted)
    return (*at_wanted(found, wanted), *[None] * 7)


triton_experts.register_autograd(first_order(_backward), setup_context=_remember)


def _config(weights: Weights, x_TD: Tensor, num_assignments: int) -> Config:
    shape = shape_of(tuple(weights.down_EFD.shape), weights.kind, x_TD.device, x_TD.dtype)
    return config_for(shape, size_of(num_assignments))
