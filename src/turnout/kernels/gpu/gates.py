"""Scores, the best k of each row, their weights and counts per expert in one pass over the logits; and its gradient.

A row's reductions are by the threads that hold it; nothing but the logits is read and nothing is written twice.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(1 << 31))  # below the rank of every logit
NAN_RANK = tl.constexpr((1 << 31) - 1)


@triton.jit
def rank_of(x):
    """Whole numbers in the order of x: NaN before everything, as torch's argmax has it, and both zeros alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN_RANK, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def of_rank(rank):
    """The reverse; the rank of NaN is the bits of one."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def log_sigmoid(x):
    """A NaN stays one."""
    return tl.where(x < 0.0, x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def choose_kernel(
    logits_RE,
    bias_E,
    token_R,
    scores_RE,
    weight_N,
    expert_N,
    token_N,
    choice_N,
    count_BE,
    num_rows,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ROWS rows of a program, BLOCK_R at a time; SIGMOID: scores are shares of sigmoids, not of exponentials.

    HAS_BIAS: what is chosen by is the sigmoid and this bias. Of equals the lower index is chosen, none twice.
    """
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    is_e, is_k = e < E, k < K
    counts = tl.zeros((BLOCK_E,), tl.int32)
    start = tl.program_id(0) * ROWS
    for first in range(0, tl.minimum(ROWS, num_rows - start), BLOCK_R):
        row = start + first + tl.arange(0, BLOCK_R)
        is_row = row < num_rows
        inside = is_row[:, None] & is_e[None, :]
        at = row.to(tl.int64)[:, None] * E + e[None, :]
        logits = tl.load(logits_RE + at, mask=inside, other=-float("inf"))
        value = log_sigmoid(logits) if SIGMOID else logits
        # a NaN that is no maximum is one of the powers, and so of their sum
        most = tl.max(value, axis=1)
        power = tl.exp(value - most[:, None])
        total = tl.sum(power, axis=1)
        tl.store(scores_RE + at, power / total[:, None], mask=inside)
        if HAS_BIAS:
            by = tl.sigmoid(logits) + tl.load(bias_E + e, mask=is_e, other=0.0)[None, :]
        else:
            by = logits
        rank = tl.where(is_e[None, :], rank_of(by), LEAST)
        expert = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
        chosen = tl.full((BLOCK_R, BLOCK_K), -float("inf"), tl.float32)
        for choice in tl.static_range(K):
            best, pick = tl.max(rank, axis=1, return_indices=True, return_indices_tie_break_left=True)
            is_pick = e[None, :] == pick[:, None]
            rank = tl.where(is_pick, LEAST, rank)
            logit = tl.sum(tl.where(is_pick, logits, 0.0), axis=1) if HAS_BIAS else of_rank(best)
            expert = tl.where(k[None, :] == choice, pick[:, None], expert)
            chosen = tl.where(k[None, :] == choice, logit[:, None], chosen)
        counts += tl.sum((inside & (rank == LEAST)).to(tl.int32), axis=0)
        if RENORMALIZE:
            own = log_sigmoid(chosen) if SIGMOID else chosen
            own = tl.where(is_k[None, :], tl.exp(own - tl.max(own, axis=1)[:, None]), 0.0)
            weight = own / tl.sum(own, axis=1)[:, None]
        elif SIGMOID:
            weight = tl.sigmoid(chosen)
        else:
            weight = tl.exp(chosen - most[:, None]) / total[:, None]
        n = row.to(tl.int64)[:, None] * K + k[None, :]
        is_n = is_row[:, None] & is_k[None, :]
        tl.store(weight_N + n, weight * scale, mask=is_n)
        tl.store(expert_N + n, expert.to(tl.int64), mask=is_n)
        token = tl.load(token_R + row, mask=is_row, other=0)
        tl.store(token_N + n, tl.zeros((BLOCK_R, BLOCK_K), tl.int64) + token[:, None], mask=is_n)
        tl.store(choice_N + n, tl.zeros((BLOCK_R, BLOCK_K), tl.int64) + k[None, :], mask=is_n)
    tl.store(count_BE + tl.program_id(0).to(tl.int64) * E + e, counts, mask=is_e)


@triton.jit
def choose_grad_kernel(
    logits_RE,
    scores_RE,
    weight_N,
    expert_N,
    scores_grad_RE,
    weight_grad_N,
    logits_grad_RE,
    num_rows,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BY_SCORES: tl.constexpr,
    BY_WEIGHTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Through the scores, the weights, or both: shares (d - sum of shares d) of what they are shares of."""
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row, is_e = row < num_rows, e < E
    inside = is_row[:, None] & is_e[None, :]
    at = row.to(tl.int64)[:, None] * E + e[None, :]
    is_n = is_row[:, None] & (k < K)[None, :]
    n = row.to(tl.int64)[:, None] * K + k[None, :]
    scores = tl.load(scores_RE + at, mask=inside, other=0.0)
    scores_grad = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    if BY_SCORES:
        scores_grad += tl.load(scores_grad_RE + at, mask=inside, other=0.0)
    # what the weights give, to each choice and then to its column
    by_choice = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if BY_WEIGHTS:
        weight = tl.load(weight_N + n, mask=is_n, other=0.0)
        weight_grad = tl.load(weight_grad_N + n, mask=is_n, other=0.0)
        if RENORMALIZE:
            by_choice = weight * (weight_grad - (tl.sum(weight * weight_grad, axis=1) / scale)[:, None])
        elif SIGMOID:
            by_choice = weight * weight_grad
        else:
            by_choice = weight_grad * scale
    by_column = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for choice in tl.static_range(K):
        if BY_WEIGHTS:
            pick = tl.load(expert_N + row.to(tl.int64) * K + choice, mask=is_row, other=-1)
            given = tl.sum(tl.where(k[None, :] == choice, by_choice, 0.0), axis=1)
            by_column += tl.where(e[None, :] == pick[:, None], given[:, None], 0.0)
    if not RENORMALIZE and not SIGMOID:
        scores_grad += by_column
    grad = scores * (scores_grad - tl.sum(scores * scores_grad, axis=1)[:, None])
    if RENORMALIZE or SIGMOID:
        grad += by_column
    if SIGMOID:
        # of the logarithm of a sigmoid, and of a sigmoid over itself, the slope is 1 less the sigmoid
        grad *= tl.sigmoid(-tl.load(logits_RE + at, mask=inside, other=0.0))
    tl.store(logits_grad_RE + at, grad, mask=inside)
