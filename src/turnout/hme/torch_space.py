"""Tensors of torch in float64 on a device, by the names that `NumpySpace` has."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from turnout.errors import ConfigError
from turnout.hme.space import DEVICES, RANK_TOLERANCE, Call, NumpySpace

MOST_BLOCK_BYTES = 1 << 30  # of the widest array of a block on a GPU, whose calls cost more than its cache saves
BLOCK_SHARE, HELD_SHARE = 64, 2  # such an array is at most this part of a GPU's memory, held rows of what is free


@lru_cache(maxsize=16)
def on(device: torch.device) -> NumpySpace:
    """The one space of tensors on `device`."""
    return cast(NumpySpace, TorchSpace(device))


def named(device: Any) -> NumpySpace:
    """The space that a user names.

    Raises: ConfigError unless `device` names the host or a CUDA device that is there.
    """
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"device={device!r} must be {DEVICES}") from None
    if asked.type == "cpu":
        return on(torch.device("cpu"))
    if asked.type != "cuda":
        raise ConfigError(f"device={device!r} must be {DEVICES}: EM needs float64 there, in torch's own operations")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r}: torch {torch.__version__} finds no CUDA device here; "
            "choose device=None (numpy) or 'cpu', or install torch with CUDA on a machine that has one"
        )
    number = torch.cuda.current_device() if asked.index is None else asked.index
    if number >= torch.cuda.device_count():
        raise ConfigError(f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices, from 'cuda:0' on")
    return on(torch.device("cuda", number))


class TorchSpace:
    """Stands in for `NumpySpace`, whose names it has, in numpy's meaning."""

    add: Call = staticmethod(torch.add)
    multiply: Call = staticmethod(torch.multiply)
    exp: Call = staticmethod(torch.exp)
    log: Call = staticmethod(torch.log)
    log1p: Call = staticmethod(torch.log1p)
    sqrt: Call = staticmethod(torch.sqrt)
    reciprocal: Call = staticmethod(torch.reciprocal)
    where: Call = staticmethod(torch.where)
    isfinite: Call = staticmethod(torch.isfinite)
    zeros_like: Call = staticmethod(torch.zeros_like)
    concatenate: Call = staticmethod(torch.concatenate)
    gammaln: Call = staticmethod(torch.lgamma)
    cholesky: Call = staticmethod(torch.linalg.cholesky)
    inv: Call = staticmethod(torch.linalg.inv)
    eigh: Call = staticmethod(torch.linalg.eigh)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.holds_rows = device.type != "cpu"

    def block_bytes(self, usual: int) -> int:
        if self.device.type == "cpu":
            return usual
        total = torch.cuda.get_device_properties(self.device).total_memory
        return max(usual, min(MOST_BLOCK_BYTES, total // BLOCK_SHARE))

    def most_held_bytes(self, usual: int) -> int:
        if self.device.type == "cpu":
            return usual
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(usual, free // HELD_SHARE)

    def asarray(self, array: Any) -> Tensor:
        if isinstance(array, np.ndarray):
            # torch warns of memory that is read alone
            array = torch.from_numpy(array if array.flags.writeable else array.copy())
        return array.to(self.device, torch.float64)

    def index(self, places: Any) -> Any:
        return places if isinstance(places, slice) else torch.as_tensor(places, device=self.device)

    def room(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def empty(self, shape: Sequence[int]) -> Tensor:
        return self.room(*shape)

    def zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64, device=self.device)

    def eye(self, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64, device=self.device)

    @staticmethod
    def subtract(left: Tensor | float, right: Tensor, out: Tensor | None = None) -> Tensor:
        if isinstance(left, Tensor):
            return torch.subtract(left, right, out=out)
        # torch takes a number on the right alone
        return torch.neg(right, out=out).add_(left)

    @staticmethod
    def maximum(left: Tensor, right: Tensor | float, out: Tensor | None = None) -> Tensor:
        return torch.clamp(left, min=right, out=out)

    @staticmethod
    def minimum(left: Tensor, right: Tensor | float, out: Tensor | None = None) -> Tensor:
        return torch.clamp(left, max=right, out=out)

    @staticmethod
    def max(array: Tensor, axis: int | tuple[int, ...], *, keepdims: bool = False) -> Tensor:
        return torch.amax(array, dim=axis, keepdim=keepdims)

    @staticmethod
    def min(array: Tensor, axis: int | tuple[int, ...], *, keepdims: bool = False) -> Tensor:
        return torch.amin(array, dim=axis, keepdim=keepdims)

    @staticmethod
    def positive_max(array: Tensor) -> Tensor | float:
        return array.max().clamp(min=0.0) if array.numel() else 0.0

    @staticmethod
    def einsum(path: str, *arrays: Tensor, out: Tensor | None = None) -> Tensor:
        found = torch.einsum(path, *arrays)
        return found if out is None else out.copy_(found)

    @staticmethod
    def ascontiguousarray(array: Tensor) -> Tensor:
        return array.contiguous()

    @staticmethod
    def permuted(array: Tensor, *axes: int) -> Tensor:
        return array.permute(axes)

    @staticmethod
    def product(left_EP: Tensor, right_PN: Tensor, out_EN: Tensor | None = None) -> Tensor:
        return torch.mm(left_EP, right_PN, out=out_EN)

    @staticmethod
    def solutions(unit_MPP: Tensor, right_MPO: Tensor) -> tuple[Tensor, Tensor]:
        factor_MPP, failed_M = torch.linalg.cholesky_ex(unit_MPP)
        pivots_MP = torch.diagonal(factor_MPP, dim1=1, dim2=2)
        is_regular_M = (failed_M == 0) & (pivots_MP.amin(dim=1) > RANK_TOLERANCE)
        # the others get the identity, so that no pivot of zero makes an error
        identity_PP = torch.eye(unit_MPP.shape[1], dtype=torch.float64, device=unit_MPP.device)
        safe_MPP = torch.where(is_regular_M[:, None, None], factor_MPP, identity_PP)
        return torch.cholesky_solve(right_MPO, safe_MPP), is_regular_M
