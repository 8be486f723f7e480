"""Linear algebra on batches of small symmetric matrices."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from turnout.hme.space import RANK_TOLERANCE, NumpySpace, space_of
from turnout.hme.tree import Floats, Ints

# inputs from which on products of pairs would take more memory than the rows are worth: 128 rows, 64 MiB
MANY_INPUTS = 360


@lru_cache(maxsize=64)
def pairs(size: int) -> tuple[Ints, Ints]:
    """The pairs p <= q of `size` numbers, as two arrays."""
    return np.triu_indices(size)


@lru_cache(maxsize=64)
def pairs_in(space: NumpySpace, size: int) -> tuple[Any, Any]:
    """`pairs`, as arrays in `space` are indexed by."""
    p_Q, q_Q = pairs(size)
    return space.index(p_Q), space.index(q_Q)


def pair_products(x_PN: Floats) -> Floats:
    """x_p x_q for all p <= q: with it a weighted sum of x x^T for any number of weights is one matrix product.

    Shapes: x_PN (P, N); returns (P (P + 1) / 2, N).
    """
    size, num_rows = x_PN.shape
    space = space_of(x_PN)
    product_QN, start = space.room(size * (size + 1) // 2, num_rows), 0
    for p in range(size):
        space.multiply(x_PN[p], x_PN[p:], out=product_QN[start : start + size - p])
        start += size - p
    return product_QN


def weighted_grams(x_PN: Floats, weight_EN: Floats) -> Floats:
    """The sums of w x x^T as packed pairs p <= q, (E, Q), one after the other: memory for one matrix beside them."""
    space = space_of(x_PN)
    p_Q, q_Q = pairs_in(space, len(x_PN))
    gram_EQ = space.empty((len(weight_EN), len(p_Q)))
    for gram_Q, weight_N in zip(gram_EQ, weight_EN, strict=True):
        gram_Q[:] = product(x_PN * weight_N, x_PN.T)[p_Q, q_Q]
    return gram_EQ


def product(left_EP: Floats, right_PN: Floats, out_EN: Floats | None = None) -> Floats:
    """The matrix product, (E, N); written to `out_EN` if given."""
    return space_of(left_EP).product(left_EP, right_PN, out_EN)


def stacked(part_EN: Sequence[Floats]) -> Floats:
    """The parts (any axes before their rows) one after another, as (E, N): a view where they make up one array."""
    num_rows, whole = part_EN[0].shape[-1], getattr(part_EN[0], "base", None)
    if whole is not None and whole.ndim == 1 and all(part.base is whole for part in part_EN):
        begin = end = _address(part_EN[0])
        for part in part_EN:
            is_next = part.flags.c_contiguous and _address(part) == end
            end = end + part.nbytes if is_next else -1
        if end >= begin:
            start = (begin - _address(whole)) // 8
            return whole[start : start + (end - begin) // 8].reshape(-1, num_rows)
    return space_of(part_EN[0]).concatenate([part.reshape(-1, num_rows) for part in part_EN])


def _address(array: Floats) -> int:
    return array.__array_interface__["data"][0]


def unpack(packed_MQ: Floats, size: int) -> Floats:
    """Symmetric matrices from their pairs p <= q: (..., size (size + 1) / 2) to (..., size, size)."""
    space = space_of(packed_MQ)
    p_Q, q_Q = pairs_in(space, size)
    full = space.empty((*packed_MQ.shape[:-1], size, size))
    full[..., p_Q, q_Q] = packed_MQ
    full[..., q_Q, p_Q] = packed_MQ
    return full


def diagonals(a_MPP: Floats) -> Floats:
    """A view of the diagonals, (M, P)."""
    return space_of(a_MPP).einsum("mpp->mp", a_MPP)


def solve_symmetric(a_MPP: Floats, b_MPO: Floats) -> Floats:
    """The solutions of a x = b for positive semi-definite a; where a is singular, the one of least length.

    Cholesky says which matrices are regular; the others go by their eigenvalues, so that no input gives NaN.
    Shapes: a_MPP (M, P, P), b_MPO (M, P, O); returns (M, P, O).
    """
    space = space_of(a_MPP)
    if 0 in a_MPP.shape or 0 in b_MPO.shape:
        return space.zeros_like(b_MPO)
    # with a unit diagonal the pivots of all columns are in one unit, whatever the scale of the inputs
    diagonal_MP = diagonals(a_MPP)
    scale_MP = 1 / space.sqrt(space.where(diagonal_MP > 0, diagonal_MP, 1.0))
    unit_MPP = a_MPP * scale_MP[:, :, None] * scale_MP[:, None, :]
    right_MPO = b_MPO * scale_MP[:, :, None]
    solved_MPO, is_regular_M = space.solutions(unit_MPP, right_MPO)
    if not is_regular_M.all():
        solved_MPO[~is_regular_M] = _least_length(unit_MPP[~is_regular_M], right_MPO[~is_regular_M])
    return solved_MPO * scale_MP[:, :, None]


def _least_length(a_MPP: Floats, b_MPO: Floats) -> Floats:
    space = space_of(a_MPP)
    value_MP, vector_MPP = space.eigh(a_MPP)
    is_kept_MP = value_MP > RANK_TOLERANCE**2 * a_MPP.shape[1] * space.maximum(value_MP[:, -1:], 1e-300)
    inverse_MP = space.where(is_kept_MP, 1 / space.where(is_kept_MP, value_MP, 1.0), 0.0)
    return vector_MPP @ (inverse_MP[:, :, None] * (vector_MPP.swapaxes(1, 2) @ b_MPO))
