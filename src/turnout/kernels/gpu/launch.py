"""The kernels, called on tensors: all experts forward and backward, without asking the device for a number."""

# where Triton is not installed, a type checker takes a kernel for a function, which is not launched by [grid]; where it
# is, for one that is called with constexpr only
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
from torch import Tensor

from turnout.kernels.arguments import KINDS, Gradients, Weights
from turnout.kernels.gpu.backward import bias_grad_kernel, hidden_grad_kernel, matrix_grad_kernel, weight_grad_kernel
from turnout.kernels.gpu.configs import Config, Tile
from turnout.kernels.gpu.forward import combine_kernel, rows_kernel, up_kernel
from turnout.kernels.gpu.grid import boxes, given, is_boxed, programs, settings, widens
from turnout.kernels.gpu.order import Routes, sort


def forward(
    x_TD: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    keep_N: Tensor | None,
    weights: Weights,
    config: Config,
    *,
    top_k: int,
    keep: bool,
    count_BE: Tensor | None = None,
) -> tuple[Tensor, Tensor, Routes]:
    """y_TD; what was before the activation, (N, G), or nothing without `keep`; and the routes. All is contiguous."""
    routes = sort(
        expert_N,
        token_N,
        keep_N,
        num_tokens=len(x_TD),
        num_experts=len(weights.up_EDG),
        rows=config.rows,
        top_k=top_k,
        count_BE=count_BE,
    )
    num_experts, hidden, dim = weights.down_EFD.shape
    num, width = len(weight_N), weights.up_EDG.shape[2]
    up_MG = x_TD.new_empty(num if keep else 0, width)
    if num == 0:
        return torch.zeros_like(x_TD), up_MG, routes
    h_MF, y_MD = x_TD.new_empty(num, hidden), x_TD.new_empty(num, dim)
    start_E, tile_start_E = routes.start_2E.unbind()
    boxed = is_boxed(config, weights.up_EDG, h_MF)  # the second half of a gated kind starts where h ends
    up_matrix = boxes(weights.up_EDG, (config.up.depth, config.up.columns)) if boxed else weights.up_EDG
    up_kernel[(programs(x_TD, num, num_experts, hidden, config, config.up),)](
        x_TD, routes.token_M, up_matrix, given(weights.up_bias_EG, x_TD), up_MG, h_MF, start_E, tile_start_E,
        D=dim, F=hidden, KIND=KINDS[weights.kind], HAS_BIAS=weights.up_bias_EG is not None, KEEP=keep,
        **settings(x_TD, num_experts, config, config.up, boxed=boxed),
    )  # fmt: skip
    _rows_by_matrix(h_MF, weights.down_EFD, weights.down_bias_ED, y_MD, routes, config, config.down, transposed=False)
    y_TD = torch.empty_like(x_TD)
    combine(y_MD, weight_N, token_N, routes, y_TD, top_k=top_k)
    return y_TD, up_MG, routes


def backward(
    y_grad_TD: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    weights: Weights,
    routes: Routes,
    up_MG: Tensor,
    config: Config,
    *,
    top_k: int,
    wanted: tuple[bool, ...],
) -> Gradients:
    """Gradients of those inputs that are `wanted`, in the order of Gradients and each in its own dtype."""
    num_experts, hidden, dim = weights.down_EFD.shape
    inputs = (x_TD, weight_N, weights.up_EDG, weights.down_EFD, weights.up_bias_EG, weights.down_bias_ED)
    fresh = torch.empty_like if len(weight_N) else torch.zeros_like
    x_grad, weight_grad, up_grad, down_grad, up_bias_grad, down_bias_grad = grads = tuple(
        fresh(tensor) if tensor is not None and is_wanted else None
        for tensor, is_wanted in zip(inputs, wanted, strict=True)
    )
    num = len(weight_N)
    if num == 0:
        return Gradients(*grads)
    up_grad_MG, weighted_h_MF = torch.empty_like(up_MG), x_TD.new_empty(num, hidden)
    num_cols = triton.cdiv(hidden, config.hidden_grad.columns)
    share_CM = x_TD.new_empty(num_cols, num, dtype=torch.float32)
    start_E, tile_start_E = routes.start_2E.unbind()
    has_bias, tile = weights.down_bias_ED is not None, config.hidden_grad
    boxed = is_boxed(config, weights.down_EFD)
    down_matrix = boxes(weights.down_EFD, (tile.columns, tile.depth)) if boxed else weights.down_EFD
    hidden_grad_kernel[(programs(x_TD, num, num_experts, hidden, config, tile),)](
        y_grad_TD, routes.token_M, routes.assignment_M, weight_N, down_matrix, given(weights.down_bias_ED, x_TD),
        up_MG, up_grad_MG, weighted_h_MF, share_CM, start_E, tile_start_E, num,
        D=dim, F=hidden, KIND=KINDS[weights.kind], HAS_BIAS=has_bias,
        **settings(x_TD, num_experts, config, tile, boxed=boxed),
    )  # fmt: skip
    if weight_grad is not None:
        weight_grad_kernel[(triton.cdiv(num, 256),)](share_CM, routes.row_N, weight_grad, num, num_cols, BLOCK=256)
    if down_grad is not None:
        _matrix_grad(weighted_h_MF, y_grad_TD, down_grad, routes, config, left_by_token=False)
    if up_grad is not None:
        _matrix_grad(x_TD, up_grad_MG, up_grad, routes, config, left_by_token=True)
    for rows, out, by_token in ((up_grad_MG, up_bias_grad, False), (y_grad_TD, down_bias_grad, True)):
        if out is not None:
            _bias_grad(rows, weight_N, out, routes, by_token=by_token)
    if x_grad is not None:
        x_grad_MD = x_TD.new_empty(num, dim)
        _rows_by_matrix(up_grad_MG, weights.up_EDG, None, x_grad_MD, routes, config, config.x_grad, transposed=True)
        combine(x_grad_MD, None, token_N, routes, x_grad, top_k=top_k)
    return Gradients(*grads)


def _rows_by_matrix(
    rows_MK: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    out_MN: Tensor,
    routes: Routes,
    config: Config,
    tile: Tile,
    *,
    transposed: bool,
) -> None:
    (num, depth), columns, num_experts = rows_MK.shape, out_MN.shape[1], len(matrix)
    start_E, tile_start_E = routes.start_2E.unbind()
    boxed = is_boxed(config, rows_MK, matrix)
    left, right = rows_MK, matrix
    if boxed:
        left = boxes(rows_MK, (config.rows, tile.depth))
        right = boxes(matrix, (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns))
    rows_kernel[(programs(rows_MK, num, num_experts, columns, config, tile),)](
        left, right, given(bias, rows_MK), out_MN, start_E, tile_start_E,
        K=depth, N=columns, TRANSPOSED=transposed, HAS_BIAS=bias is not None,
        **settings(rows_MK, num_experts, config, tile, boxed=boxed),
    )  # fmt: skip


def combine(
    rows_MD: Tensor, weight_N: Tensor | None, token_N: Tensor, routes: Routes, out_TD: Tensor, *, top_k: int
) -> None:
    """Each token's rows added; tokens the router never saw get zero."""
    num_tokens, dim = out_TD.shape
    num_runs = len(token_N) // top_k if top_k else num_tokens
    if num_runs != num_tokens:
        out_TD.zero_()
    block = min(1024, triton.next_power_of_2(dim))
    tokens = max(1, 2048 // block) if num_runs > 1024 or not out_TD.is_cuda else 1
    combine_kernel[(triton.cdiv(num_runs, tokens), triton.cdiv(dim, block))](
        rows_MD, given(weight_N, rows_MD), routes.row_N, token_N, routes.order_N, routes.offset_T, out_TD, num_runs,
        D=dim, TOP_K=top_k, WEIGHTED=weight_N is not None, BLOCK_T=tokens, BLOCK_D=block,
    )  # fmt: skip


def _matrix_grad(
    left: Tensor, right: Tensor, out_EIJ: Tensor, routes: Routes, config: Config, *, left_by_token: bool
) -> None:
    num_experts, num_i, num_j = out_EIJ.shape
    tile = config.matrix_grad
    num = num_experts * triton.cdiv(num_i, config.matrix_rows) * triton.cdiv(num_j, tile.columns)
    matrix_grad_kernel[(num,)](
        left, right, routes.token_M, out_EIJ, routes.start_2E[0],
        NUM_I=num_i, NUM_J=num_j, LEFT_BY_TOKEN=left_by_token, PRECISION="ieee", WIDEN=widens(left),
        BLOCK_M=tile.depth, BLOCK_I=config.matrix_rows, BLOCK_J=tile.columns, GROUP=config.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _bias_grad(rows: Tensor, weight_N: Tensor, out_EJ: Tensor, routes: Routes, *, by_token: bool) -> None:
    num_experts, columns = out_EJ.shape
    bias_grad_kernel[(num_experts, triton.cdiv(columns, 64))](
        rows, routes.token_M, routes.assignment_M, weight_N, out_EJ, routes.start_2E[0],
        NUM_J=columns, BY_TOKEN=by_token, BLOCK_M=64, BLOCK_J=64,
    )  # fmt: skip
