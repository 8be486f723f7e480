"""Experts in 8-bit floating point (e4m3): rows rounded in blocks with scales, and the two products of the codes.

SIDE rows and columns of a matrix share a scale, and SIDE columns of a row of x. A scale is a power of two, so that only
the 3 bits of a code's mantissa round. Sums of 128 products or fewer are added up in float32 outside the matrix unit,
whose own sums of this format keep fewer bits: https://arxiv.org/abs/2412.19437, section 3.3.2.
"""

import triton
import triton.language as tl

from turnout.kernels.gpu.activation import activated
from turnout.kernels.gpu.tiles import at_rows, block_of, product, rows_of, swizzled, within


@triton.jit
def rounded(x):
    """Codes of rows, and the least power of two for each that brings its largest value within 448."""
    # of zeros alone any scale will do
    most = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30) * 0.002232142857142857
    bits = (most.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    return (x * inverse[:, None]).to(tl.float8e4nv), bits.to(tl.float32, bitcast=True)


@triton.jit
def round_kernel(x_TD, codes_TD, scale_TB, num_rows, D: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Each row's blocks of SIDE columns as codes and scales."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tl.program_id(1)
    d = block * SIDE + tl.arange(0, SIDE)
    inside = (row < num_rows)[:, None] & within(d, D, SIDE)[None, :]
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    codes, scale = rounded(tl.load(x_TD + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(codes_TD + at, codes, mask=inside)
    tl.store(scale_TB + row.to(tl.int64) * tl.cdiv(D, SIDE) + block, scale, mask=row < num_rows)


@triton.jit
def up_codes_kernel(
    codes_TD,
    scale_TB,
    token_M,
    up_EFD,
    up_scale_EBB,
    up_bias_EG,
    h_MF,
    h_scale_MB,
    start_E,
    tile_start_E,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    BOXED: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """h = act(x[token] up + bias), rounded in blocks of BLOCK_N columns. Gate and value are matrices of their own."""
    PARTS: tl.constexpr = 2 if KIND >= 2 else 1
    num_cols = tl.cdiv(F, BLOCK_N)
    num_tiles = tl.load(tile_start_E + E)
    BLOCKS_D: tl.constexpr = (D + SIDE - 1) // SIDE
    BLOCKS_F: tl.constexpr = (F + SIDE - 1) // SIDE
    place = tl.arange(0, BLOCK_M)
    for program in tl.range(tl.program_id(0), num_tiles * num_cols, tl.num_programs(0), flatten=PERSISTENT):
        tile, col = swizzled(program, num_tiles, num_cols, GROUP)
        expert, first_row, is_row = rows_of(tile, start_E, tile_start_E, E, BLOCK_E, BLOCK_M)
        token = tl.load(token_M + first_row + place, mask=is_row, other=0).to(tl.int64)
        f = col * BLOCK_N + tl.arange(0, BLOCK_N)
        is_f = within(f, F, BLOCK_N)
        matrix = expert * PARTS
        scales = up_scale_EBB + (matrix * BLOCKS_F + col * BLOCK_N // SIDE) * BLOCKS_D
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(BLOCKS_D):
            first = block * SIDE
            d = first + tl.arange(0, SIDE)
            is_x = is_row[:, None] & within(d, D, SIDE)[None, :]
            x = tl.load(codes_TD + token[:, None] * D + d[None, :], mask=is_x, other=0.0)
            x_scale = tl.load(scale_TB + token * BLOCKS_D + block, mask=is_row, other=0.0)
            up = scaled(
                up, x, x_scale, up_EFD, scales + block, matrix, col * BLOCK_N, first, F, D, BLOCK_N, SIDE, BOXED, WIDEN
            )
            if PARTS == 2:
                at = scales + BLOCKS_F * BLOCKS_D + block
                value = scaled(
                    value, x, x_scale, up_EFD, at, matrix + 1, col * BLOCK_N, first, F, D, BLOCK_N, SIDE, BOXED, WIDEN
                )
        if HAS_BIAS:
            bias = up_bias_EG + expert * F * PARTS + f
            up += tl.load(bias, mask=is_f, other=0.0).to(tl.float32)[None, :]
            if PARTS == 2:
                value += tl.load(bias + F, mask=is_f, other=0.0).to(tl.float32)[None, :]
        # columns past the last are zeros, which no scale heeds
        codes, scale = rounded(activated(up, value, KIND))
        tl.store(at_rows(h_MF, first_row, f, F, BLOCK_M), codes, mask=is_row[:, None] & is_f[None, :])
        tl.store(h_scale_MB + (first_row.to(tl.int64) + place) * num_cols + col, scale, mask=is_row)


@triton.jit
def down_codes_kernel(
    h_MF,
    h_scale_MB,
    down_EDF,
    down_scale_EBB,
    down_bias_ED,
    y_MD,
    start_E,
    tile_start_E,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BOXED: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """y = h down + bias, one row for each assignment; h has a scale for each BLOCK_K columns."""
    num_cols = tl.cdiv(D, BLOCK_N)
    num_tiles = tl.load(tile_start_E + E)
    BLOCKS_D: tl.constexpr = (D + SIDE - 1) // SIDE
    BLOCKS_F: tl.constexpr = (F + SIDE - 1) // SIDE
    STEPS: tl.constexpr = (F + BLOCK_K - 1) // BLOCK_K
    place = tl.arange(0, BLOCK_M)
    for program in tl.range(tl.program_id(0), num_tiles * num_cols, tl.num_programs(0), flatten=PERSISTENT):
        tile, col = swizzled(program, num_tiles, num_cols, GROUP)
        expert, first_row, is_row = rows_of(tile, start_E, tile_start_E, E, BLOCK_E, BLOCK_M)
        wide_row = first_row.to(tl.int64)
        d = col * BLOCK_N + tl.arange(0, BLOCK_N)
        is_d = within(d, D, BLOCK_N)
        scales = down_scale_EBB + (expert * BLOCKS_D + col * BLOCK_N // SIDE) * BLOCKS_F
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(STEPS):
            first = step * BLOCK_K
            if BOXED:
                h = h_MF.load([first_row, first])
            else:
                f = first + tl.arange(0, BLOCK_K)
                is_h = is_row[:, None] & within(f, F, BLOCK_K)[None, :]
                h = tl.load(at_rows(h_MF, first_row, f, F, BLOCK_M), mask=is_h, other=0.0)
            h_scale = tl.load(h_scale_MB + (wide_row + place) * STEPS + step, mask=is_row, other=0.0)
            total = scaled(
                total,
                h,
                h_scale,
                down_EDF,
                scales + first // SIDE,
                expert,
                col * BLOCK_N,
                first,
                D,
                F,
                BLOCK_N,
                BLOCK_K,
                BOXED,
                WIDEN,
            )
        if HAS_BIAS:
            total += tl.load(down_bias_ED + expert * D + d, mask=is_d, other=0.0).to(tl.float32)[None, :]
        at = at_rows(y_MD, first_row, d, D, BLOCK_M)
        tl.store(at, total.to(y_MD.dtype.element_ty), mask=is_row[:, None] & is_d[None, :])


@triton.jit
def scaled(
    total,
    left,
    left_scale,
    matrix,
    scale,
    which,
    first_row,
    first_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BOXED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """total + left @ block.T, with the scales of both; the matrix unit takes codes with the inner size last alone."""
    block = block_of(matrix, which, first_row, first_column, 0, ROWS, COLUMNS, COLUMNS, BLOCK_R, BLOCK_C, BOXED)
    found = product(left, block.T, tl.zeros(total.shape, tl.float32), "ieee", WIDEN)
    return total + found * (left_scale * tl.load(scale))[:, None]
