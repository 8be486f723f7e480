"""Assignments in the order of their experts by counting, without a sort and without asking the device for a number.

An expert's rows are in the order of the assignments. Blocks of assignments are counted side by side, the counts of
the blocks before are added up for each expert, and each assignment then knows its row.
"""

import triton
import triton.language as tl


@triton.jit
def keys(expert_N, token_N, keep_N, n, num_assignments, num_tokens, E: tl.constexpr, HAS_KEEP: tl.constexpr):
    """Experts of the assignments n, E where one is dropped; and whether all name what exists."""
    is_n = n < num_assignments
    expert = tl.load(expert_N + n, mask=is_n, other=0)
    token = tl.load(token_N + n, mask=is_n, other=0)
    exists = (expert >= 0) & (expert < E) & (token >= 0) & (token < num_tokens)
    is_kept = is_n & exists
    if HAS_KEEP:
        is_kept = is_kept & (tl.load(keep_N + n, mask=is_n, other=0) != 0)
    # past the end everything is well
    return tl.where(is_kept, expert, E).to(tl.int32), tl.min((exists | (n >= num_assignments)).to(tl.int32), axis=0)


@triton.jit
def count_kernel(
    expert_N,
    token_N,
    keep_N,
    count_BE,
    place_N,
    valid,
    num_assignments,
    num_tokens,
    E: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Rows of each expert among a block of assignments, and each one's place among those of its expert there.

    A dropped one has place -1, and so has one that names what does not exist: the block is then not `valid`.
    """
    first = tl.program_id(0) * BLOCK
    n = first + tl.arange(0, BLOCK)
    expert, is_valid = keys(expert_N, token_N, keep_N, n, num_assignments, num_tokens, E, HAS_KEEP)
    tl.store(valid + tl.program_id(0), is_valid)
    place = tl.zeros((BLOCK,), tl.int32)
    # a few at a time: all at once are more than registers hold
    for start in range(0, BLOCK, 16):
        other_n = first + start + tl.arange(0, 16)
        other, _ = keys(expert_N, token_N, keep_N, other_n, num_assignments, num_tokens, E, HAS_KEEP)
        earlier = (other[None, :] == expert[:, None]) & (other_n[None, :] < n[:, None])
        place += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(place_N + n, tl.where(expert < E, place, -1), mask=n < num_assignments)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(expert, BINS)
    tl.store(count_BE + tl.program_id(0).to(tl.int64) * E + bins, counts, mask=bins < E)


@triton.jit
def before_kernel(
    count_BE, before_BE, total_E, num_blocks, E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):
    """`before_BE`, which may be `count_BE`, gets the counts of the blocks before; `total_E` what all have."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        at = block[:, None].to(tl.int64) * E + expert[None, :]
        mask = (block < num_blocks)[:, None] & (expert < E)[None, :]
        counts = tl.load(count_BE + at, mask=mask, other=0)
        through = tl.cumsum(counts, axis=0)
        tl.store(before_BE + at, total[None, :] + through - counts, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(total_E + expert, total, mask=expert < E)


@triton.jit
def start_kernel(total_E, start_E, tile_start_E, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Where each expert's rows start, and its tiles of BLOCK_M rows; one more entry holds the end of all."""
    expert = tl.arange(0, BLOCK_E)
    totals = tl.load(total_E + expert, mask=expert < E, other=0)
    tl.store(start_E, 0)
    tl.store(tile_start_E, 0)
    tl.store(start_E + 1 + expert, tl.cumsum(totals, axis=0), mask=expert < E)
    tiles = tl.cumsum((totals + BLOCK_M - 1) // BLOCK_M, axis=0)
    tl.store(tile_start_E + 1 + expert, tiles, mask=expert < E)


@triton.jit
def place_kernel(
    expert_N,
    token_N,
    count_BE,
    start_E,
    row_N,
    token_M,
    assignment_M,
    num_assignments,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    """Each assignment's row, in place of its place; and each row's assignment and token."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_n = n < num_assignments
    place = tl.load(row_N + n, mask=is_n, other=-1)
    is_kept = place >= 0
    expert = tl.load(expert_N + n, mask=is_kept, other=0)
    before = tl.load(count_BE + (n // COUNT_BLOCK).to(tl.int64) * E + expert, mask=is_kept, other=0)
    row = tl.load(start_E + expert, mask=is_kept, other=0) + before + place
    tl.store(row_N + n, row, mask=is_kept)
    tl.store(assignment_M + row, n, mask=is_kept)
    tl.store(token_M + row, tl.load(token_N + n, mask=is_kept, other=0).to(tl.int32), mask=is_kept)


@triton.jit
def counted_kernel(
    expert_N,
    token_N,
    before_BE,
    start_E,
    row_N,
    token_M,
    assignment_M,
    num_assignments,
    E: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same where a router counted blocks of SIZE assignments, all of which are kept and name what exists."""
    first = tl.program_id(0) * SIZE
    inside = tl.arange(0, BLOCK)
    n, is_n = first + inside, (inside < SIZE) & (first + inside < num_assignments)
    expert = tl.load(expert_N + n, mask=is_n, other=E).to(tl.int32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, SIZE, 16):
        other_inside = start + tl.arange(0, 16)
        other_n = first + other_inside
        is_other = (other_inside < SIZE) & (other_n < num_assignments)
        other = tl.load(expert_N + other_n, mask=is_other, other=E).to(tl.int32)
        earlier = (other[None, :] == expert[:, None]) & (other_n[None, :] < n[:, None])
        place += tl.sum(earlier.to(tl.int32), axis=1)
    before = tl.load(before_BE + tl.program_id(0).to(tl.int64) * E + expert, mask=is_n, other=0)
    row = tl.load(start_E + expert, mask=is_n, other=0) + before + place
    tl.store(row_N + n, row, mask=is_n)
    tl.store(assignment_M + row, n, mask=is_n)
    tl.store(token_M + row, tl.load(token_N + n, mask=is_n, other=0).to(tl.int32), mask=is_n)


@triton.jit
def few_kernel(
    expert_N,
    token_N,
    keep_N,
    row_N,
    token_M,
    assignment_M,
    start_E,
    tile_start_E,
    valid,
    num_assignments,
    num_tokens,
    E: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """All of it in one program, for so few assignments that each is compared with every other: a step of decoding."""
    n = tl.arange(0, BLOCK)
    expert, is_valid = keys(expert_N, token_N, keep_N, n, num_assignments, num_tokens, E, HAS_KEEP)
    tl.store(valid, is_valid)
    row = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, 16):
        other_n = start + tl.arange(0, 16)
        other, _ = keys(expert_N, token_N, keep_N, other_n, num_assignments, num_tokens, E, HAS_KEEP)
        is_earlier = (other[None, :] == expert[:, None]) & (other_n[None, :] < n[:, None])
        # E, of what is dropped, comes after all experts
        row += tl.sum(((other[None, :] < expert[:, None]) | is_earlier).to(tl.int32), axis=1)
    is_kept = expert < E
    tl.store(row_N + n, tl.where(is_kept, row, -1), mask=n < num_assignments)
    tl.store(assignment_M + row, n, mask=is_kept)
    tl.store(token_M + row, tl.load(token_N + n, mask=is_kept, other=0).to(tl.int32), mask=is_kept)
    bins = tl.arange(0, BINS)
    totals = tl.where(bins < E, tl.histogram(expert, BINS), 0)
    tl.store(start_E, 0)
    tl.store(tile_start_E, 0)
    tl.store(start_E + 1 + bins, tl.cumsum(totals, axis=0), mask=bins < E)
    tl.store(tile_start_E + 1 + bins, tl.cumsum((totals + BLOCK_M - 1) // BLOCK_M, axis=0), mask=bins < E)
