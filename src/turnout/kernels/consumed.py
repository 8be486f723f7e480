"""Values kept for a backward pass, whose memory goes back to the system as they are read.

The gradients of the weights take their place; without it both are held when a pass ends.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch


class _Mallinfo2(ctypes.Structure):
    """Of malloc.h; the fifth is the bytes in blocks of their own."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def mapped_bytes() -> int:
    """Bytes in blocks that glibc took from the system one by one, and gives back when they are freed.

    An allocator that keeps memory has none: what is given back there has to be faulted in again, at 3 GB/s.
    """
    ask = _mallinfo2()
    return 0 if ask is None else ask().hblkhd


def is_read_once() -> bool:
    """Asked in a forward pass: whether saved tensors come to its backward pass as they are, and to nobody else."""
    hooks = getattr(_autograd(), "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(True) is None


def is_last_pass() -> bool:
    """Asked in a backward pass: whether there cannot be another (no retain_graph=True)."""
    keeps = getattr(_autograd(), "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _autograd() -> object:
    # where torch has the two, they are what its own compiler asks before it takes a saved tensor's memory
    return getattr(torch._C, "_autograd", None)


@functools.cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform.startswith("linux") else None
    if ask is not None:
        ask.restype = _Mallinfo2
    return ask
