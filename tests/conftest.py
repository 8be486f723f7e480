"""Every test runs on one thread, and finds NaN wherever memory was taken but not written."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch.utils import deterministic

from turnout.cache import kernel_cache

settings.register_profile("turnout", deadline=None, derandomize=True, database=None)
settings.load_profile("turnout")
torch.set_num_threads(1)
# tests with a cache of their own would compile the kernel once more each
os.environ.setdefault("TURNOUT_KERNELS", str(kernel_cache()))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (the largest integer for integers); ops without a fixed order warn."""
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    deterministic.fill_uninitialized_memory = fill
