"""Large weights lie on large pages where Linux has such, and nothing else about them changes."""

import re
import sys
from pathlib import Path

import pytest
import torch

from turnout.experts import FFNExperts
from turnout.kernels import pages
from turnout.kernels.pages import LEAST_BYTES, on_large_pages

CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def piece_of(weights: torch.Tensor) -> dict[str, str]:
    """What Linux says of the piece of this process's memory that holds the middle of `weights`.

    Not the sum over the process: other tests' garbage comes and goes in it.
    """
    middle = weights.data_ptr() + weights.nbytes // 2
    text = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    for piece in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)[1:]:
        ends, _, facts = piece.partition(" ")
        first, last = (int(end, 16) for end in ends.split("-"))
        if first <= middle < last:
            return dict(re.findall(r"(?m)^(\w+): +(.*)$", facts))
    raise AssertionError("no such piece of memory")


@pytest.mark.skipif(
    sys.platform != "linux" or not CHOICE.exists() or "[never]" in CHOICE.read_text(encoding="ascii"),
    reason="Linux has no large pages here",
)
@pytest.mark.parametrize("is_filled", [False, True])
def test_memory_is_on_large_pages_filled_before_or_after(*, is_filled: bool) -> None:
    fresh = torch.empty(8 * LEAST_BYTES, dtype=torch.uint8)
    weights = on_large_pages(fresh.zero_() if is_filled else fresh).fill_(7)
    piece = piece_of(weights)
    assert "hg" in piece["VmFlags"].split()
    # how many depends on how much of the machine's memory is in one piece: a run of CI got half
    assert int(piece["AnonHugePages"].split()[0]) > 0
    assert weights.min() == 7


def test_a_cast_of_the_experts_is_on_large_pages_and_has_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, asked = FFNExperts(512, 1024, 16), []
    want = experts.up_EDG.detach().bfloat16()
    monkeypatch.setattr(pages, "_advise", lambda: lambda start, length, advice: asked.append((start, length, advice)))
    cast = experts.bfloat16()
    assert torch.equal(cast.up_EDG, want)
    assert cast.up_EDG.requires_grad
    at = cast.up_EDG.data_ptr()
    # memory that the allocator had kept is not moved
    assert [advice for _, _, advice in asked] == [pages.MADV_HUGEPAGE] * 2
    assert at <= asked[0][0] <= at + pages.PAGE
    assert asked[0][1] > want.nbytes - 2 * pages.PAGE
    assert cast.bfloat16().up_EDG.data_ptr() == at
    assert cast.share_memory().up_EDG.is_shared()
    assert FFNExperts(512, 1024, 16).to("meta").up_EDG.is_meta


def test_values_stay_and_what_has_no_memory_of_its_own_is_left_alone() -> None:
    weights = torch.randn(LEAST_BYTES)
    copy = weights.clone()
    assert on_large_pages(weights) is weights
    assert torch.equal(weights, copy)
    for tensor in (torch.empty(LEAST_BYTES, device="meta"), torch.ones(3), weights[5 : LEAST_BYTES // 2]):
        assert on_large_pages(tensor) is tensor
    assert torch.equal(weights, copy)
