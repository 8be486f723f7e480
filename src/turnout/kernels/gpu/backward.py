"""Gradients of what forward.py computes. Of the forward pass only what was before the activation is kept."""

import triton
import triton.language as tl

from turnout.kernels.gpu.activation import activated, up_gradient, value_gradient
from turnout.kernels.gpu.tiles import at_rows, block_of, product, rows_of, swizzled, within


@triton.jit
def hidden_grad_kernel(
    y_grad_TD,
    token_M,
    assignment_M,
    weight_N,
    down_EFD,
    down_bias_ED,
    up_MG,
    up_grad_MG,
    weighted_h_MF,
    share_CM,
    start_E,
    tile_start_E,
    num_assignments,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    KIND: tl.constexpr,
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
    """From the gradient of y to that before the activation, for one tile of an expert's rows.

    Beside it: weight * h, which the gradient of the second matrix multiplies; and this column's share of the gradient
    of the weight, <y_grad, expert(x)> = <y_grad down^T, h> + <y_grad, bias>, for which no output row is kept.
    """
    GATED: tl.constexpr = KIND >= 2
    G: tl.constexpr = 2 * F if GATED else F
    num_cols = tl.cdiv(F, BLOCK_N)
    num_tiles = tl.load(tile_start_E + E)
    place = tl.arange(0, BLOCK_M)
    for program in tl.range(tl.program_id(0), num_tiles * num_cols, tl.num_programs(0), flatten=PERSISTENT):
        tile, col = swizzled(program, num_tiles, num_cols, GROUP)
        expert, first_row, is_row = rows_of(tile, start_E, tile_start_E, E, BLOCK_E, BLOCK_M)
        row = first_row + place
        token = tl.load(token_M + row, mask=is_row, other=0).to(tl.int64)
        f = col * BLOCK_N + tl.arange(0, BLOCK_N)
        is_f = within(f, F, BLOCK_N)
        h_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, D, BLOCK_K):
            d = first + tl.arange(0, BLOCK_K)
            is_y = is_row[:, None] & within(d, D, BLOCK_K)[None, :]
            y_grad = tl.load(y_grad_TD + token[:, None] * D + d[None, :], mask=is_y, other=0.0)
            down = block_of(down_EFD, expert, col * BLOCK_N, first, 0, F, D, D, BLOCK_N, BLOCK_K, BOXED)
            h_grad = product(y_grad, down.T, h_grad, PRECISION, WIDEN)
        inside = is_row[:, None] & is_f[None, :]
        at_up = at_rows(up_MG, first_row, f, G, BLOCK_M)
        up = tl.load(at_up, mask=inside, other=0.0).to(tl.float32)
        value = up
        if GATED:
            value = tl.load(at_up + F, mask=inside, other=0.0).to(tl.float32)
        # rounded as the forward pass rounded it
        h = activated(up, value, KIND).to(weighted_h_MF.dtype.element_ty).to(tl.float32)
        share = tl.sum(tl.where(inside, h * h_grad, 0.0), axis=1)
        if HAS_BIAS:
            if col == 0:
                for first in range(0, D, BLOCK_K):
                    d = first + tl.arange(0, BLOCK_K)
                    is_d = within(d, D, BLOCK_K)
                    at = y_grad_TD + token[:, None] * D + d[None, :]
                    y_grad = tl.load(at, mask=is_row[:, None] & is_d[None, :], other=0.0).to(tl.float32)
                    bias = tl.load(down_bias_ED + expert * D + d, mask=is_d, other=0.0).to(tl.float32)
                    share += tl.sum(y_grad * bias[None, :], axis=1)
        tl.store(share_CM + tl.cast(col, tl.int64) * num_assignments + row, share, mask=is_row)
        assignment = tl.load(assignment_M + row, mask=is_row, other=0)
        weight = tl.load(weight_N + assignment, mask=is_row, other=0.0)[:, None]
        at = at_rows(weighted_h_MF, first_row, f, F, BLOCK_M)
        tl.store(at, (weight * h).to(weighted_h_MF.dtype.element_ty), mask=inside)
        h_grad *= weight
        out = at_rows(up_grad_MG, first_row, f, G, BLOCK_M)
        tl.store(out, up_gradient(up, value, h_grad, KIND).to(up_grad_MG.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(out + F, value_gradient(up, value, h_grad, KIND).to(up_grad_MG.dtype.element_ty), mask=inside)


@triton.jit
def matrix_grad_kernel(
    left_RI,
    right_RJ,
    token_M,
    out_EIJ,
    start_E,
    NUM_I: tl.constexpr,
    NUM_J: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum over an expert's rows of left^T right, written once; exact zeros for an expert without rows.

    One of the two lies by row, the other by token.
    """
    num_i, num_j = tl.cdiv(NUM_I, BLOCK_I), tl.cdiv(NUM_J, BLOCK_J)
    expert = tl.program_id(0) // (num_i * num_j)
    tile_i, tile_j = swizzled(tl.program_id(0) % (num_i * num_j), num_i, num_j, GROUP)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    is_i, is_j = within(i, NUM_I, BLOCK_I), within(j, NUM_J, BLOCK_J)
    end = tl.load(start_E + expert + 1)
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for first in range(tl.load(start_E + expert), end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        is_row = row < end
        token = tl.load(token_M + row, mask=is_row, other=0).to(tl.int64)
        left_row = token if LEFT_BY_TOKEN else row.to(tl.int64)
        right_row = row.to(tl.int64) if LEFT_BY_TOKEN else token
        at = left_RI + left_row[None, :] * NUM_I + i[:, None]
        left = tl.load(at, mask=is_i[:, None] & is_row[None, :], other=0.0)
        at = right_RJ + right_row[:, None] * NUM_J + j[None, :]
        right = tl.load(at, mask=is_row[:, None] & is_j[None, :], other=0.0)
        total = product(left, right, total, PRECISION, WIDEN)
    at = out_EIJ + expert.to(tl.int64) * NUM_I * NUM_J + i[:, None].to(tl.int64) * NUM_J + j[None, :]
    tl.store(at, total.to(out_EIJ.dtype.element_ty), mask=is_i[:, None] & is_j[None, :])


@triton.jit
def bias_grad_kernel(
    rows_RJ,
    token_M,
    assignment_M,
    weight_N,
    out_EJ,
    start_E,
    NUM_J: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sum over an expert's rows; those that lie BY_TOKEN are weighted."""
    expert = tl.program_id(0)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    is_j = within(j, NUM_J, BLOCK_J)
    end = tl.load(start_E + expert + 1)
    total = tl.zeros((BLOCK_J,), tl.float32)
    for first in range(tl.load(start_E + expert), end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        is_row = row < end
        at = row
        if BY_TOKEN:
            at = tl.load(token_M + row, mask=is_row, other=0)
        value = tl.load(
            rows_RJ + at[:, None].to(tl.int64) * NUM_J + j[None, :], mask=is_row[:, None] & is_j[None, :], other=0.0
        ).to(tl.float32)
        if BY_TOKEN:
            assignment = tl.load(assignment_M + row, mask=is_row, other=0)
            value *= tl.load(weight_N + assignment, mask=is_row, other=0.0)[:, None]
        total += tl.sum(value, axis=0)
    tl.store(out_EJ + expert.to(tl.int64) * NUM_J + j, total.to(out_EJ.dtype.element_ty), mask=is_j)


@triton.jit
def weight_grad_kernel(share_CM, row_N, out_N, num_assignments, num_cols, BLOCK: tl.constexpr):
    """Shares of all columns added in their order, at each assignment; zero for a dropped one."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_n = n < num_assignments
    row = tl.load(row_N + n, mask=is_n, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for col in range(num_cols):
        at = share_CM + tl.cast(col, tl.int64) * num_assignments + row
        total += tl.load(at, mask=row >= 0, other=0.0)
    tl.store(out_N + n, total, mask=is_n)
