"""A setting of the whole process that its owner makes: a command, or a rank that a benchmark started."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Ask glibc not to give large tensors back to the kernel, to be faulted in again at each step.

    Measured on a two-core machine: 20-40% of a layer's time. False where there is no glibc, or the user has set
    MALLOC_* variables of their own.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
