"""The kernels, called on tensors: all experts forward and backward, without asking the device for a number."""

# where Triton is not installed, a type checker takes a kernel for a function, which is not launched by [grid]; where it
# is, for one that is called with constexpr only
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from turnout.kernels.arguments import KINDS, Gradients, Weights
from turnout.kernels.gpu.backward import bias_grad_kernel, hidden_grad_kernel, matrix_grad_kernel, weight_grad_kernel
from turnout.kernels.gpu.configs import Config, Tile
from turnout.kernels.gpu.forward import combine_kernel, rows_kernel, up_kernel
from turnout.kernels.gpu.routes import before_kernel, count_kernel, few_kernel, place_kernel, start_kernel

COUNT_BLOCK = 256  # assignments that are compared with each other


class Routes(NamedTuple):
    """Assignments in the order of the experts, all on the device; int32."""

    row_N: Tensor  # -1: dropped
    token_M: Tensor  # of each row; the rows past the last are unspecified
    assignment_M: Tensor
    start_2E: Tensor  # (2, E + 1): where each expert's rows start, and its tiles
    order_N: Tensor  # assignments token by token, where top_k does not say so
    offset_T: Tensor  # (T + 1,): where each token's start


def sort(
    expert_N: Tensor,
    token_N: Tensor,
    keep_N: Tensor | None,
    *,
    num_tokens: int,
    num_experts: int,
    rows: int,
    top_k: int,
) -> Routes:
    """Order the kept assignments by expert, in tiles of `rows`.

    Raises: a device-side assertion if an assignment names an expert or a token that does not exist.
    """
    num, device = len(expert_N), expert_N.device
    expert_N, token_N = expert_N.contiguous(), token_N.contiguous()
    row_N, token_M, assignment_M = (torch.empty(num, dtype=torch.int32, device=device) for _ in range(3))
    start_2E = torch.empty(2, num_experts + 1, dtype=torch.int32, device=device)
    start_E, tile_start_E = start_2E.unbind()
    bins = triton.next_power_of_2(num_experts + 1)
    num_blocks = triton.cdiv(num, COUNT_BLOCK)
    valid = torch.empty(num_blocks, dtype=torch.int32, device=device)
    has_keep, keep = keep_N is not None, row_N if keep_N is None else keep_N.contiguous()
    by_token = (row_N.new_empty(0), row_N.new_empty(0)) if top_k else _by_token(token_N, num_tokens)
    routes = Routes(row_N, token_M, assignment_M, start_2E, *by_token)
    if num == 0:
        start_2E.zero_()
        return routes
    if num_blocks == 1:
        few_kernel[(1,)](
            expert_N, token_N, keep, row_N, token_M, assignment_M, start_E, tile_start_E, valid, num, num_tokens,
            E=num_experts, HAS_KEEP=has_keep, BLOCK=max(16, triton.next_power_of_2(num)), BINS=bins, BLOCK_M=rows,
        )  # fmt: skip
    else:
        count_BE = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
        total_E = torch.empty(num_experts, dtype=torch.int32, device=device)
        count_kernel[(num_blocks,)](
            expert_N, token_N, keep, count_BE, row_N, valid, num, num_tokens,
            E=num_experts, HAS_KEEP=has_keep, BLOCK=COUNT_BLOCK, BINS=bins, num_warps=8,
        )  # fmt: skip
        before_kernel[(triton.cdiv(num_experts, 16),)](
            count_BE, total_E, num_blocks, E=num_experts, BLOCK_B=128, BLOCK_E=16
        )
        start_kernel[(1,)](total_E, start_E, tile_start_E, E=num_experts, BLOCK_M=rows, BLOCK_E=bins)
        place_kernel[(num_blocks,)](
            expert_N, token_N, count_BE, start_E, row_N, token_M, assignment_M, num,
            E=num_experts, BLOCK=COUNT_BLOCK, COUNT_BLOCK=COUNT_BLOCK,
        )  # fmt: skip
    torch._assert_async(valid if num_blocks == 1 else valid.all())
    return routes


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
    )
    num_experts, hidden, dim = weights.down_EFD.shape
    num, width = len(weight_N), weights.up_EDG.shape[2]
    up_MG = x_TD.new_empty(num if keep else 0, width)
    if num == 0:
        return torch.zeros_like(x_TD), up_MG, routes
    h_MF, y_MD = x_TD.new_empty(num, hidden), x_TD.new_empty(num, dim)
    start_E, tile_start_E = routes.start_2E.unbind()
    boxed = _is_boxed(config, weights.up_EDG, h_MF)  # the second half of a gated kind starts where h ends
    up_matrix = _boxes(weights.up_EDG, (config.up.depth, config.up.columns)) if boxed else weights.up_EDG
    up_kernel[(_programs(x_TD, num, num_experts, hidden, config, config.up),)](
        x_TD, routes.token_M, up_matrix, _or(weights.up_bias_EG, x_TD), up_MG, h_MF, start_E, tile_start_E,
        D=dim, F=hidden, KIND=KINDS[weights.kind], HAS_BIAS=weights.up_bias_EG is not None, KEEP=keep,
        **_settings(x_TD, num_experts, config, config.up, boxed=boxed),
    )  # fmt: skip
    _rows_by_matrix(h_MF, weights.down_EFD, weights.down_bias_ED, y_MD, routes, config, config.down, transposed=False)
    y_TD = torch.empty_like(x_TD)
    _combine(y_MD, weight_N, token_N, routes, y_TD, top_k=top_k)
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
    boxed = _is_boxed(config, weights.down_EFD)
    down_matrix = _boxes(weights.down_EFD, (tile.columns, tile.depth)) if boxed else weights.down_EFD
    hidden_grad_kernel[(_programs(x_TD, num, num_experts, hidden, config, tile),)](
        y_grad_TD, routes.token_M, routes.assignment_M, weight_N, down_matrix, _or(weights.down_bias_ED, x_TD),
        up_MG, up_grad_MG, weighted_h_MF, share_CM, start_E, tile_start_E, num,
        D=dim, F=hidden, KIND=KINDS[weights.kind], HAS_BIAS=has_bias,
        **_settings(x_TD, num_experts, config, tile, boxed=boxed),
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
        _combine(x_grad_MD, None, token_N, routes, x_grad, top_k=top_k)
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
    boxed = _is_boxed(config, rows_MK, matrix)
    left, right = rows_MK, matrix
    if boxed:
        left = _boxes(rows_MK, (config.rows, tile.depth))
        right = _boxes(matrix, (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns))
    rows_kernel[(_programs(rows_MK, num, num_experts, columns, config, tile),)](
        left, right, _or(bias, rows_MK), out_MN, start_E, tile_start_E,
        K=depth, N=columns, TRANSPOSED=transposed, HAS_BIAS=bias is not None,
        **_settings(rows_MK, num_experts, config, tile, boxed=boxed),
    )  # fmt: skip


def _combine(
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
        rows_MD, _or(weight_N, rows_MD), routes.row_N, token_N, routes.order_N, routes.offset_T, out_TD, num_runs,
        D=dim, TOP_K=top_k, WEIGHTED=weight_N is not None, BLOCK_T=tokens, BLOCK_D=block,
    )  # fmt: skip


def _matrix_grad(
    left: Tensor, right: Tensor, out_EIJ: Tensor, routes: Routes, config: Config, *, left_by_token: bool
) -> None:
    num_experts, num_i, num_j = out_EIJ.shape
    tile = config.matrix_grad
    programs = num_experts * triton.cdiv(num_i, config.matrix_rows) * triton.cdiv(num_j, tile.columns)
    matrix_grad_kernel[(programs,)](
        left, right, routes.token_M, out_EIJ, routes.start_2E[0],
        NUM_I=num_i, NUM_J=num_j, LEFT_BY_TOKEN=left_by_token, PRECISION="ieee", WIDEN=_widens(left),
        BLOCK_M=tile.depth, BLOCK_I=config.matrix_rows, BLOCK_J=tile.columns, GROUP=config.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _bias_grad(rows: Tensor, weight_N: Tensor, out_EJ: Tensor, routes: Routes, *, by_token: bool) -> None:
    num_experts, columns = out_EJ.shape
    bias_grad_kernel[(num_experts, triton.cdiv(columns, 64))](
        rows, routes.token_M, routes.assignment_M, weight_N, out_EJ, routes.start_2E[0],
        NUM_J=columns, BY_TOKEN=by_token, BLOCK_M=64, BLOCK_J=64,
    )  # fmt: skip


def _settings(x: Tensor, num_experts: int, config: Config, tile: Tile, *, boxed: bool) -> dict:
    return {
        "E": num_experts,
        "PRECISION": "ieee",
        "WIDEN": _widens(x),
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "BLOCK_M": config.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP": config.group,
        "BOXED": boxed,
        "PERSISTENT": config.persistent,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _widens(x: Tensor) -> bool:
    # the CPU is reached by the interpreter alone
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _programs(x: Tensor, num: int, num_experts: int, columns: int, config: Config, tile: Tile) -> int:
    """Enough for any routing: every expert with rows may have one tile that is not full."""
    most = (min(num_experts, num) + num // config.rows) * triton.cdiv(columns, tile.columns)
    return min(most, _multiprocessors(x.device)) if config.persistent else most


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # the interpreter has none: a few programs that have several tiles each
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _is_boxed(config: Config, *tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch of all of them: it wants rows that start at 16 bytes."""
    if not config.boxed:
        return False
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * tensor.element_size() % 16 == 0 for tensor in tensors)


def _boxes(tensor: Tensor, block: tuple[int, int]) -> "TensorDescriptor":
    """Blocks of rows and columns; of one expert's, where there are experts."""
    return TensorDescriptor.from_tensor(tensor, [*[1] * (tensor.dim() - 2), *block])


def _by_token(token_N: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    in_order_N, order_N = token_N.to(torch.int32).sort(stable=True)
    first_T = torch.arange(num_tokens + 1, dtype=torch.int32, device=token_N.device)
    return order_N.to(torch.int32), torch.searchsorted(in_order_N, first_T, out_int32=True)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is wanted even where nothing is read."""
    return other if tensor is None else tensor
