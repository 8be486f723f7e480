"""Where arrays lie, numpy's in memory or torch's on a device, and the functions that are asked of either.

The mathematics of gates and experts is written once, in numpy's words: functions take those of `space_of` their arrays,
and Python's operators. On the host these are numpy's own functions, `out=` and all; `turnout.hme.torch_space` has the
same names for tensors. (The array API standard has neither `out=` nor places for arrays, which make numpy fast here.)
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.special import gammaln

from turnout.errors import ConfigError
from turnout.hme.tree import Floats

# where an array of a shape is to stand: a space's `room`, or that of a workspace
MakeRoom = Callable[..., Floats]
Call = Callable[..., Any]
CACHE_LINE = 8  # numbers of eight bytes in a line of a core's cache
# multiplications of a product from which on torch is asked for it
LEAST_FOR_TORCH = 400_000
# rows of a matrix from which on solving one after the other by its Cholesky factor beats a batch by LU
LARGE_SYSTEM = 256
# pivots of a Cholesky factor closer than this are rounding: the matrix is taken as singular
RANK_TOLERANCE = 1e-7
DEVICES = "None (numpy), 'cpu', 'cuda' or 'cuda:1' (torch in float64)"


def room(*shape: int) -> Floats:
    """An array without values that begins where a cache line does, a view of a flat array.

    numpy's own begin a quarter of a line later, so that vectors of eight numbers lie across two lines each: passes over
    such arrays take up to twice as long. Rows of a multiple of CACHE_LINE numbers begin with a line too.
    """
    size = math.prod(shape)
    whole = np.empty(size + CACHE_LINE - 1)
    start = -(whole.__array_interface__["data"][0] // 8) % CACHE_LINE
    return whole[start : start + size].reshape(shape)


class NumpySpace:
    """Arrays of numpy; `TorchSpace` stands in for it where they are tensors."""

    add: Call = staticmethod(np.add)
    subtract: Call = staticmethod(np.subtract)
    multiply: Call = staticmethod(np.multiply)
    exp: Call = staticmethod(np.exp)
    log: Call = staticmethod(np.log)
    log1p: Call = staticmethod(np.log1p)
    sqrt: Call = staticmethod(np.sqrt)
    reciprocal: Call = staticmethod(np.reciprocal)
    minimum: Call = staticmethod(np.minimum)
    maximum: Call = staticmethod(np.maximum)
    where: Call = staticmethod(np.where)
    isfinite: Call = staticmethod(np.isfinite)
    gammaln: Call = staticmethod(gammaln)
    einsum: Call = staticmethod(np.einsum)
    concatenate: Call = staticmethod(np.concatenate)
    ascontiguousarray: Call = staticmethod(np.ascontiguousarray)
    eye: Call = staticmethod(np.eye)
    zeros: Call = staticmethod(np.zeros)
    zeros_like: Call = staticmethod(np.zeros_like)
    empty: Call = staticmethod(np.empty)
    room: Call = staticmethod(room)
    cholesky: Call = staticmethod(np.linalg.cholesky)
    inv: Call = staticmethod(np.linalg.inv)
    eigh: Call = staticmethod(np.linalg.eigh)
    # over one axis or several, which hold at least one number
    max: Call = staticmethod(np.max)
    min: Call = staticmethod(np.min)

    holds_rows = False  # whether rows are worth keeping even without their products, since the way here is long

    def block_bytes(self, usual: int) -> int:
        """How large the widest array of a block of rows is to be; `usual`: what suits a core's cache."""
        return usual

    def most_held_bytes(self, usual: int) -> int:
        """How much of the rows may be kept from pass to pass; `usual`: what suits a host."""
        return usual

    def asarray(self, array: Any) -> Floats:
        """The same numbers here; the array itself if it is here."""
        return array if isinstance(array, np.ndarray) else array.cpu().numpy()

    def index(self, places: Any) -> Any:
        """Places or a mask of places, as arrays here are indexed by."""
        return places

    def positive_max(self, array: Floats) -> Any:
        """The largest number, or zero: of no numbers, too."""
        return array.max(initial=0.0)

    def permuted(self, array: Floats, *axes: int) -> Floats:
        return array.transpose(axes)

    def product(self, left_EP: Floats, right_PN: Floats, out_EN: Floats | None = None) -> Floats:
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

    def solutions(self, unit_MPP: Floats, right_MPO: Floats) -> tuple[Any, NDArray[np.bool_]]:
        """Of systems with unit diagonals, and which of them were regular; what the others have is no solution."""
        if unit_MPP.shape[1] >= LARGE_SYSTEM:
            return _in_turn(unit_MPP, right_MPO)
        is_regular_M = _is_regular(unit_MPP)
        if is_regular_M.all():
            return np.linalg.solve(unit_MPP, right_MPO), is_regular_M
        solved_MPO = np.zeros_like(right_MPO)
        solved_MPO[is_regular_M] = np.linalg.solve(unit_MPP[is_regular_M], right_MPO[is_regular_M])
        return solved_MPO, is_regular_M


NUMPY = NumpySpace()


def space_of(array: Any) -> NumpySpace:
    """Where this array lies."""
    if isinstance(array, np.ndarray):
        return NUMPY
    return importlib.import_module("turnout.hme.torch_space").on(array.device)


def space_for(device: Any) -> NumpySpace:
    """The place that a user names: None is numpy; 'cpu', 'cuda' or 'cuda:1' are torch in float64 there.

    Raises: ConfigError for any other device, and where torch or a CUDA device is missing.
    """
    if device is None:
        return NUMPY
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"device={device!r} needs torch: pip install torch, or leave device at None for numpy")
    return importlib.import_module("turnout.hme.torch_space").named(device)


def _in_turn(unit_MPP: Floats, right_MPO: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """One matrix after the other: its Cholesky factor says whether it is regular, and solves."""
    solved_MPO, is_regular_M = np.zeros_like(right_MPO), np.zeros(len(unit_MPP), dtype=bool)
    for model, (unit_PP, right_PO) in enumerate(zip(unit_MPP, right_MPO, strict=True)):
        try:
            factor_PP = cholesky(unit_PP, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        if np.diagonal(factor_PP).min() > RANK_TOLERANCE:
            is_regular_M[model] = True
            solved_MPO[model] = cho_solve((factor_PP, True), right_PO, check_finite=False)
    return solved_MPO, is_regular_M


def _is_regular(unit_MPP: Floats) -> NDArray[np.bool_]:
    try:
        pivots_MP = np.diagonal(np.linalg.cholesky(unit_MPP), axis1=1, axis2=2)
    except np.linalg.LinAlgError:
        # one singular matrix fails the whole batch
        return np.linalg.eigvalsh(unit_MPP)[:, 0] > RANK_TOLERANCE**2 * unit_MPP.shape[1]
    return pivots_MP.min(axis=1) > RANK_TOLERANCE
