"""Linear algebra on batches of small symmetric matrices."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky

from turnout.hme.tree import Floats, Ints

# pivots of a Cholesky factor closer than this are rounding: the matrix is taken as singular
RANK_TOLERANCE = 1e-7
# where an array of a shape is to stand: `room`, or that of a workspace
MakeRoom = Callable[..., Floats]
CACHE_LINE = 8  # numbers of eight bytes in a line of a core's cache
# multiplications of a product from which on torch is asked for it
LEAST_FOR_TORCH = 400_000
# inputs from which on products of pairs would take more memory than the rows are worth: 128 rows, 64 MiB
MANY_INPUTS = 360
# rows of a matrix from which on solving one after the other by its Cholesky factor beats a batch by LU
LARGE_SYSTEM = 256


@lru_cache(maxsize=64)
def pairs(size: int) -> tuple[Ints, Ints]:
    """The pairs p <= q of `size` numbers, as two arrays."""
    return np.triu_indices(size)


def room(*shape: int) -> Floats:
    """An array without values that begins where a cache line does, a view of a flat array.

    numpy's own begin a quarter of a line later, so that vectors of eight numbers lie across two lines each: passes over
    such arrays take up to twice as long. Rows of a multiple of CACHE_LINE numbers begin with a line too.
    """
    size = math.prod(shape)
    whole = np.empty(size + CACHE_LINE - 1)
    start = -(whole.__array_interface__["data"][0] // 8) % CACHE_LINE
    return whole[start : start + size].reshape(shape)


class Workspace:
    """Memory in which block after block of rows is worked on, so that its pages and cache lines stay warm.

    Arrays of one block never overlap; `clear` takes them all back, so no result may stand in one.
    """

    def __init__(self) -> None:
        self._whole, self._used = room(0), 0

    def clear(self) -> None:
        """Begins anew, with as much memory as was asked for since the last time."""
        if self._used > len(self._whole):
            self._whole = room(self._used)
        self._used = 0

    def room(self, *shape: int) -> Floats:
        """As `room` gives; from other memory what does not fit here yet."""
        start, size = self._used, math.prod(shape)
        self._used += -(-size // CACHE_LINE) * CACHE_LINE
        return self._whole[start : start + size].reshape(shape) if self._used <= len(self._whole) else room(*shape)


def pair_products(x_PN: Floats) -> Floats:
    """x_p x_q for all p <= q: with it a weighted sum of x x^T for any number of weights is one matrix product.

    Shapes: x_PN (P, N); returns (P (P + 1) / 2, N).
    """
    size, num_rows = x_PN.shape
    product_QN = room(size * (size + 1) // 2, num_rows)
    start = 0
    for p in range(size):
        np.multiply(x_PN[p], x_PN[p:], out=product_QN[start : start + size - p])
        start += size - p
    return product_QN


def weighted_grams(x_PN: Floats, weight_EN: Floats) -> Floats:
    """The sums of w x x^T as packed pairs p <= q, (E, Q), one after the other: memory for one matrix beside them."""
    p_Q, q_Q = pairs(len(x_PN))
    gram_EQ = np.empty((len(weight_EN), len(p_Q)))
    for gram_Q, weight_N in zip(gram_EQ, weight_EN, strict=True):
        gram_Q[:] = product(x_PN * weight_N, x_PN.T)[p_Q, q_Q]
    return gram_EQ


def product(left_EP: Floats, right_PN: Floats, out_EN: Floats | None = None) -> Floats:
    """The matrix product, (E, N), by torch where it is not small; written to `out_EN` if given.

    For few rows or columns numpy's own, of OpenBLAS, takes half as long again; importing torch, as long as to fit a
    small table.
    """
    # torch warns of arrays that are read alone, as memory maps may be
    is_small = left_EP.size * right_PN.shape[1] < LEAST_FOR_TORCH
    if is_small or not (left_EP.flags.writeable and right_PN.flags.writeable):
        return np.matmul(left_EP, right_PN, out=out_EN)
    import torch

    # in numpy's memory, whose pages are used again from block to block
    out_EN = room(len(left_EP), right_PN.shape[1]) if out_EN is None else out_EN
    torch.mm(torch.from_numpy(left_EP), torch.from_numpy(right_PN), out=torch.from_numpy(out_EN))
    return out_EN


def stacked(part_EN: Sequence[Floats]) -> Floats:
    """The parts (any axes before their rows) one after another, as (E, N): a view where they make up one array."""
    num_rows, whole = part_EN[0].shape[-1], part_EN[0].base
    if whole is not None and whole.ndim == 1 and all(part.base is whole for part in part_EN):
        begin = end = _address(part_EN[0])
        for part in part_EN:
            is_next = part.flags.c_contiguous and _address(part) == end
            end = end + part.nbytes if is_next else -1
        if end >= begin:
            start = (begin - _address(whole)) // 8
            return whole[start : start + (end - begin) // 8].reshape(-1, num_rows)
    return np.concatenate([part.reshape(-1, num_rows) for part in part_EN])


def _address(array: Floats) -> int:
    return array.__array_interface__["data"][0]


def unpack(packed_MQ: Floats, size: int) -> Floats:
    """Symmetric matrices from their pairs p <= q: (..., size (size + 1) / 2) to (..., size, size)."""
    p_Q, q_Q = pairs(size)
    full = np.empty((*packed_MQ.shape[:-1], size, size))
    full[..., p_Q, q_Q] = packed_MQ
    full[..., q_Q, p_Q] = packed_MQ
    return full


def solve_symmetric(a_MPP: Floats, b_MPO: Floats) -> Floats:
    """The solutions of a x = b for positive semi-definite a; where a is singular, the one of least length.

    Cholesky says which matrices are regular; the others go by their eigenvalues, so that no input gives NaN.
    Shapes: a_MPP (M, P, P), b_MPO (M, P, O); returns (M, P, O).
    """
    if not a_MPP.size or not b_MPO.size:
        return np.zeros_like(b_MPO)
    # with a unit diagonal the pivots of all columns are in one unit, whatever the scale of the inputs
    diagonal_MP = np.diagonal(a_MPP, axis1=1, axis2=2)
    scale_MP = 1 / np.sqrt(np.where(diagonal_MP > 0, diagonal_MP, 1.0))
    unit_MPP = a_MPP * scale_MP[:, :, None] * scale_MP[:, None, :]
    right_MPO = b_MPO * scale_MP[:, :, None]
    if a_MPP.shape[1] >= LARGE_SYSTEM:
        solved = [_solved(unit_PP, right_PO) for unit_PP, right_PO in zip(unit_MPP, right_MPO, strict=True)]
        return np.stack(solved) * scale_MP[:, :, None]
    is_regular_M = _is_regular(unit_MPP)
    solved_MPO = np.empty_like(b_MPO)
    if is_regular_M.all():
        solved_MPO = np.linalg.solve(unit_MPP, right_MPO)
    else:
        solved_MPO[is_regular_M] = np.linalg.solve(unit_MPP[is_regular_M], right_MPO[is_regular_M])
        solved_MPO[~is_regular_M] = _least_length(unit_MPP[~is_regular_M], right_MPO[~is_regular_M])
    return solved_MPO * scale_MP[:, :, None]


def _solved(unit_PP: Floats, right_PO: Floats) -> Floats:
    """As `solve_symmetric`, for one matrix of unit diagonal: its Cholesky factor says whether it is regular."""
    try:
        factor_PP = cholesky(unit_PP, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        factor_PP = np.zeros_like(unit_PP)
    if np.diagonal(factor_PP).min() > RANK_TOLERANCE:
        return np.asarray(cho_solve((factor_PP, True), right_PO, check_finite=False), dtype=np.float64)
    return _least_length(unit_PP[None], right_PO[None])[0]


def _is_regular(unit_MPP: Floats) -> NDArray[np.bool_]:
    try:
        pivots_MP = np.diagonal(np.linalg.cholesky(unit_MPP), axis1=1, axis2=2)
    except np.linalg.LinAlgError:
        # one singular matrix fails the whole batch
        return np.linalg.eigvalsh(unit_MPP)[:, 0] > RANK_TOLERANCE**2 * unit_MPP.shape[1]
    return pivots_MP.min(axis=1) > RANK_TOLERANCE


def _least_length(a_MPP: Floats, b_MPO: Floats) -> Floats:
    value_MP, vector_MPP = np.linalg.eigh(a_MPP)
    is_kept_MP = value_MP > RANK_TOLERANCE**2 * a_MPP.shape[1] * np.maximum(value_MP[:, -1:], 1e-300)
    inverse_MP = np.where(is_kept_MP, 1 / np.where(is_kept_MP, value_MP, 1.0), 0.0)
    return vector_MPP @ (inverse_MP[:, :, None] * (vector_MPP.swapaxes(1, 2) @ b_MPO))
