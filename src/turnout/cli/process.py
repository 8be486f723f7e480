"""Settings of the whole process, which the command line owns and a library never touches unasked."""

import os

import torch

from turnout.allocator import keep_memory
from turnout.errors import ConfigError

ALLOCATORS = ("tuned", "default")


def own_process(threads: int, allocator: str = "tuned") -> str:
    """Keep freed memory and set the number of threads; returns one line that says what was done.

    With `allocator="default"` freed memory goes where the allocator as it is takes it.
    Raises: ConfigError for more threads than cores, or an unknown allocator.
    """
    if allocator not in ALLOCATORS:
        raise ConfigError(f"unknown allocator {allocator!r}; available: {', '.join(ALLOCATORS)}")
    cores = os.cpu_count() or 1
    if not 0 <= threads <= cores:
        raise ConfigError(f"--threads {threads} must be 1 to {cores} (the cores of this machine), or 0 for all")
    if threads:
        torch.set_num_threads(threads)
    kept = allocator == "tuned" and keep_memory()
    return f"{torch.get_num_threads()} threads; allocator {'keeps freed memory' if kept else 'as it is'}"
