"""Assignments in the order of the experts, by the kernels of routes.py, without asking the device for a number."""

# see launch.py
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from turnout.kernels.gpu.configs import counted_rows
from turnout.kernels.gpu.routes import (
    before_kernel,
    count_kernel,
    counted_kernel,
    few_kernel,
    place_kernel,
    start_kernel,
)

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
    count_BE: Tensor | None = None,
) -> Routes:
    """Order the kept assignments by expert, in tiles of `rows`.

    `count_BE`: what the router's kernel counted of these very assignments, in blocks of `counted_rows(top_k)` tokens;
    of many that are all kept it spares a pass.
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
    elif count_BE is not None and top_k and not has_keep:
        before_BE, size = torch.empty_like(count_BE), counted_rows(top_k) * top_k
        _start(count_BE, before_BE, routes, rows)
        counted_kernel[(len(count_BE),)](
            expert_N, token_N, before_BE, start_E, row_N, token_M, assignment_M, num,
            E=num_experts, SIZE=size, BLOCK=max(16, triton.next_power_of_2(size)),
        )  # fmt: skip
        return routes
    else:
        count_BE = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
        count_kernel[(num_blocks,)](
            expert_N, token_N, keep, count_BE, row_N, valid, num, num_tokens,
            E=num_experts, HAS_KEEP=has_keep, BLOCK=COUNT_BLOCK, BINS=bins, num_warps=8,
        )  # fmt: skip
        _start(count_BE, count_BE, routes, rows)
        place_kernel[(num_blocks,)](
            expert_N, token_N, count_BE, start_E, row_N, token_M, assignment_M, num,
            E=num_experts, BLOCK=COUNT_BLOCK, COUNT_BLOCK=COUNT_BLOCK,
        )  # fmt: skip
    torch._assert_async(valid if num_blocks == 1 else valid.all())
    return routes


def _start(count_BE: Tensor, before_BE: Tensor, routes: Routes, rows: int) -> None:
    """Where each expert starts, and what it has in the blocks before each block."""
    num_blocks, num_experts = count_BE.shape
    total_E = count_BE.new_empty(num_experts)
    before_kernel[(triton.cdiv(num_experts, 16),)](
        count_BE, before_BE, total_E, num_blocks, E=num_experts, BLOCK_B=128, BLOCK_E=16
    )
    start_E, tile_start_E = routes.start_2E.unbind()
    bins = triton.next_power_of_2(num_experts + 1)
    start_kernel[(1,)](total_E, start_E, tile_start_E, E=num_experts, BLOCK_M=rows, BLOCK_E=bins)


def _by_token(token_N: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    in_order_N, order_N = token_N.to(torch.int32).sort(stable=True)
    first_T = torch.arange(num_tokens + 1, dtype=torch.int32, device=token_N.device)
    return order_N.to(torch.int32), torch.searchsorted(in_order_N, first_T, out_int32=True)
