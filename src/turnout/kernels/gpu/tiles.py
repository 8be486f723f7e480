"""Which rows and columns a program computes, and how two tiles are multiplied."""

import triton
import triton.language as tl


@triton.jit
def swizzled(program, num_rows, num_cols, GROUP: tl.constexpr):
    """Row and column of a program: GROUP rows share columns before the next, while both are in the L2 cache."""
    per_group = GROUP * num_cols
    first = program // per_group * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    inside = program % per_group
    return first + inside % size, inside // size


@triton.jit
def rows_of(tile, start_E, tile_start_E, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a tile, its first row, and which of its rows are that expert's. Experts that end before are counted."""
    expert = tl.arange(0, BLOCK_E)
    ends = tl.load(tile_start_E + 1 + expert, mask=expert < E, other=2147483647)
    mine = tl.sum((ends <= tile).to(tl.int32), axis=0)
    first = tl.load(start_E + mine) + (tile - tl.load(tile_start_E + mine)) * BLOCK_M
    return mine.to(tl.int64), first, first + tl.arange(0, BLOCK_M) < tl.load(start_E + mine + 1)


@triton.jit
def at_rows(matrix, first_row, column, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where columns of a tile's rows lie; within the tile 32 bits are enough, and half as many registers."""
    start = matrix + first_row.to(tl.int64) * COLUMNS
    return start + (tl.arange(0, BLOCK_M)[:, None] * COLUMNS + column[None, :])


@triton.jit
def within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which indices exist: all, known to the compiler, where the block divides the size."""
    if SIZE % BLOCK == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < SIZE


@triton.jit
def block_of(
    matrix,
    expert,
    first_row,
    first_column,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BOXED: tl.constexpr,
):
    """A block of an expert's matrix as it lies, ROWS by COLUMNS from column `offset` of WIDTH on; zeros beyond it.

    BOXED: `matrix` is a descriptor of (E, ROWS, WIDTH), and the tensor memory accelerator fetches the block. Columns
    past COLUMNS are then those of the other half; what they give must not be stored.
    """
    if BOXED:
        return matrix.load([expert.to(tl.int32), first_row, offset + first_column]).reshape(BLOCK_R, BLOCK_C)
    else:
        row = first_row + tl.arange(0, BLOCK_R)
        column = first_column + tl.arange(0, BLOCK_C)
        mask = within(row, ROWS, BLOCK_R)[:, None] & within(column, COLUMNS, BLOCK_C)[None, :]
        start = matrix + expert * ROWS * WIDTH + offset
        return tl.load(start + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + left @ right in float32. WIDEN: Triton 3.6's interpreter multiplies the bits of bfloat16 as integers."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)
