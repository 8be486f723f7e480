"""Rows through the experts: gather, product and activation; product and bias; each token's rows weighted and added."""

import triton
import triton.language as tl

from turnout.kernels.gpu.activation import activated
from turnout.kernels.gpu.tiles import at_rows, block_of, product, rows_of, swizzled, within


@triton.jit
def up_kernel(
    x_TD,
    token_M,
    up_EDG,
    up_bias_EG,
    up_MG,
    h_MF,
    start_E,
    tile_start_E,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BOXED: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """h = act(x[token] up + bias) for one tile of an expert's rows; KEEP: what was before the activation is kept."""
    GATED: tl.constexpr = KIND >= 2
    G: tl.constexpr = 2 * F if GATED else F
    num_cols = tl.cdiv(F, BLOCK_N)
    num_tiles = tl.load(tile_start_E + E)
    place = tl.arange(0, BLOCK_M)
    for program in tl.range(tl.program_id(0), num_tiles * num_cols, tl.num_programs(0), flatten=PERSISTENT):
        tile, col = swizzled(program, num_tiles, num_cols, GROUP)
        expert, first_row, is_row = rows_of(tile, start_E, tile_start_E, E, BLOCK_E, BLOCK_M)
        token = tl.load(token_M + first_row + place, mask=is_row, other=0).to(tl.int64)
        f = col * BLOCK_N + tl.arange(0, BLOCK_N)
        is_f = within(f, F, BLOCK_N)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, D, BLOCK_K):
            d = first + tl.arange(0, BLOCK_K)
            is_x = is_row[:, None] & within(d, D, BLOCK_K)[None, :]
            x = tl.load(x_TD + token[:, None] * D + d[None, :], mask=is_x, other=0.0)
            weight = block_of(up_EDG, expert, first, col * BLOCK_N, 0, D, F, G, BLOCK_K, BLOCK_N, BOXED)
            up = product(x, weight, up, PRECISION, WIDEN)
            if GATED:
                weight = block_of(up_EDG, expert, first, col * BLOCK_N, F, D, F, G, BLOCK_K, BLOCK_N, BOXED)
                value = product(x, weight, value, PRECISION, WIDEN)
        if HAS_BIAS:
            bias = up_bias_EG + expert * G + f
            up += tl.load(bias, mask=is_f, other=0.0).to(tl.float32)[None, :]
            if GATED:
                value += tl.load(bias + F, mask=is_f, other=0.0).to(tl.float32)[None, :]
        # rounded before the activation: the backward pass then differentiates at the very point it finds
        rounded, rounded_value = up.to(h_MF.dtype.element_ty), value.to(h_MF.dtype.element_ty)
        inside = is_row[:, None] & is_f[None, :]
        if KEEP:
            at = at_rows(up_MG, first_row, f, G, BLOCK_M)
            tl.store(at, rounded, mask=inside)
            if GATED:
                tl.store(at + F, rounded_value, mask=inside)
        h = activated(rounded.to(tl.float32), rounded_value.to(tl.float32), KIND)
        tl.store(at_rows(h_MF, first_row, f, F, BLOCK_M), h.to(h_MF.dtype.element_ty), mask=inside)


@triton.jit
def rows_kernel(
    left_MK,
    matrix,
    bias,
    out_MN,
    start_E,
    tile_start_E,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BOXED: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Rows of an expert times its K by N matrix, which lies N by K if TRANSPOSED, plus bias."""
    num_cols = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.load(tile_start_E + E)
    for program in tl.range(tl.program_id(0), num_tiles * num_cols, tl.num_programs(0), flatten=PERSISTENT):
        tile, col = swizzled(program, num_tiles, num_cols, GROUP)
        expert, first_row, is_row = rows_of(tile, start_E, tile_start_E, E, BLOCK_E, BLOCK_M)
        n = col * BLOCK_N + tl.arange(0, BLOCK_N)
        is_n = within(n, N, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, K, BLOCK_K):
            if BOXED:
                # rows past the expert's are another's, or never written: nothing of theirs is stored
                left = left_MK.load([first_row, first])
            else:
                k = first + tl.arange(0, BLOCK_K)
                is_left = is_row[:, None] & within(k, K, BLOCK_K)[None, :]
                left = tl.load(at_rows(left_MK, first_row, k, K, BLOCK_M), mask=is_left, other=0.0)
            if TRANSPOSED:
                right = block_of(matrix, expert, col * BLOCK_N, first, 0, N, K, K, BLOCK_N, BLOCK_K, BOXED).T
            else:
                right = block_of(matrix, expert, first, col * BLOCK_N, 0, K, N, N, BLOCK_K, BLOCK_N, BOXED)
            total = product(left, right, total, PRECISION, WIDEN)
        if HAS_BIAS:
            total += tl.load(bias + expert * N + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
        at = at_rows(out_MN, first_row, n, N, BLOCK_M)
        tl.store(at, total.to(out_MN.dtype.element_ty), mask=is_row[:, None] & is_n[None, :])


@triton.jit
def combine_kernel(
    rows_MD,
    weight_N,
    row_N,
    token_N,
    order_N,
    offset_T,
    y_TD,
    num_runs,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A token's rows, weighted or not, added in the order of its choices in float32; -1 stands for a dropped one.

    TOP_K: assignments lie token by token, so many each; 0: order_N and offset_T say which are a token's.
    """
    run = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_run = run < num_runs
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_d = within(d, D, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if TOP_K > 0:
        start = run * TOP_K
        taken = tl.where(is_run, TOP_K, 0)
        most = TOP_K
        token = tl.load(token_N + start, mask=is_run, other=0).to(tl.int64)
    else:
        start = tl.load(offset_T + run, mask=is_run, other=0)
        taken = tl.load(offset_T + run + 1, mask=is_run, other=0) - start
        most = tl.max(taken, axis=0)
        token = run.to(tl.int64)
    for choice in range(most):  # pyright: ignore[reportArgumentType] - a number once compiled
        is_there = choice < taken
        if TOP_K > 0:
            assignment = start + choice
        else:
            assignment = tl.load(order_N + start + choice, mask=is_there, other=0)
        row = tl.load(row_N + assignment, mask=is_there, other=-1).to(tl.int64)
        mask = (row >= 0)[:, None] & is_d[None, :]
        value = tl.load(rows_MD + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            # the weight of a dropped row is not read: NaN times zero would be NaN
            value *= tl.load(weight_N + assignment, mask=row >= 0, other=0.0)[:, None]
        total += value
    at = y_TD + token[:, None] * D + d[None, :]
    tl.store(at, total.to(y_TD.dtype.element_ty), mask=is_run[:, None] & is_d[None, :])
