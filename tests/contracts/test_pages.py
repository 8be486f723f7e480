"""Large weights lie on large pages where Linux has such, and nothing else about them changes."""

import sys
from pathlib import Path

import pytest
import torch

from turnout.kernels.pages import LEAST_BYTES, on_large_pages

CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def bytes_on_large_pages() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(sys.platform != "linux" or not CHOICE.exists(), reason="Linux has no large pages here")
@pytest.mark.parametrize("is_filled", [False, True])
def test_memory_is_on_large_pages_filled_before_or_after(*, is_filled: bool) -> None:
    before = bytes_on_large_pages()
    fresh = torch.empty(8 * LEAST_BYTES, dtype=torch.uint8)
    weights = on_large_pages(fresh.zero_() if is_filled else fresh).fill_(7)
    # some may be left on small pages where memory is in pieces
    assert bytes_on_large_pages() - before > weights.nbytes / 2
    assert weights.min() == 7


def test_values_stay_and_what_has_no_memory_of_its_own_is_left_alone() -> None:
    weights = torch.randn(LEAST_BYTES)
    copy = weights.clone()
    assert on_large_pages(weights) is weights
    assert torch.equal(weights, copy)
    for tensor in (torch.empty(LEAST_BYTES, device="meta"), torch.ones(3), weights[5 : LEAST_BYTES // 2]):
        assert on_large_pages(tensor) is tensor
    assert torch.equal(weights, copy)
