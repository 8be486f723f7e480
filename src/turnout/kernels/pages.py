"""Large weights on pages of 2 MiB: a pass that reads each once otherwise waits for addresses as well as for memory."""

import ctypes
import functools
import sys

import torch
from torch import Tensor

PAGE = 2 << 20
LEAST_BYTES = 4 * PAGE  # of less the processor remembers the addresses
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of Linux


def on_large_pages(tensor: Tensor, *, move: bool = True) -> Tensor:
    """The same tensor, its memory on pages of 2 MiB where Linux has such; a deep copy does not inherit it.

    Asked of memory that is new it costs nothing. What was written before, if only by a tensor that had the same memory,
    is moved at about 1 GB/s, or with `move` False stays where it is.
    """
    advise = _advise() if _is_large(tensor) else None
    if advise is not None:
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        length = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - start
        # what Linux cannot do it leaves as it was: memory is as good, only slower
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE) if move else (MADV_HUGEPAGE,):
            advise(start, length, advice)
    return tensor


def copied_to_large_pages(tensor: Tensor) -> Tensor:
    """The same values in a copy on such pages, where they are many: faster than to move them."""
    return on_large_pages(torch.empty_like(tensor), move=False).copy_(tensor) if _is_large(tensor) else tensor


def _is_large(tensor: Tensor) -> bool:
    is_own = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return is_own and tensor.nbytes >= LEAST_BYTES


@functools.cache
def _advise() -> "ctypes._NamedFuncPointer | None":
    if not sys.platform.startswith("linux"):
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
