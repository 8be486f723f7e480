"""Under test, memory that was taken but not written holds NaN: the guard itself is on."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_way_to_take_memory_gives_nan(dtype: torch.dtype) -> None:
    like = torch.ones(64, 64, dtype=dtype)
    assert torch.empty(64, 64, dtype=dtype).isnan().all()
    assert torch.empty_like(like).isnan().all()
    assert like.new_empty(64, 64).isnan().all()
    assert torch.empty_strided((64, 64), (64, 1), dtype=dtype).isnan().all()
    assert torch.empty(0, dtype=dtype).resize_(64, 64).isnan().all()


def test_integers_are_poisoned_with_their_largest_value() -> None:
    assert (torch.empty(64, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_kernel_that_reads_what_it_did_not_write_is_seen() -> None:
    accumulated = torch.empty(4, 4).index_add_(0, torch.tensor([0, 2]), torch.ones(2, 4))
    assert accumulated.isnan().all()
