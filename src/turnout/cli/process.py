"""Settings of the whole process, which the command line owns and a library never touches unasked."""

import ctypes
import os
import sys

import torch

from turnout.errors import ConfigError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def own_process(threads: int) -> str:
    """Keep freed memory and set the number of threads; returns one line that says what was done.

    Raises: ConfigError for more threads than cores.
    """
    cores = os.cpu_count() or 1
    if not 0 <= threads <= cores:
        raise ConfigError(f"--threads {threads} must be 1 to {cores} (the cores of this machine), or 0 for all")
    if threads:
        torch.set_num_threads(threads)
    kept = keep_memory()
    return f"{torch.get_num_threads()} threads; allocator {'keeps freed memory' if kept else 'as it is'}"


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
