"""Rows of experts as a backend wants them, one after another or in blocks, and out again."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from turnout.comm.picks import placed, runs
from turnout.tensors import Padded, Ragged, Rows


def laid_out(x_MD: Tensor, counts: Sequence[int], layout: Literal["ragged", "padded"]) -> Rows:
    """The rows in that layout; blocks are as wide as the fullest expert of this rank. Shapes: x_MD by expert."""
    counts_L = placed(counts, x_MD.device)
    if layout == "ragged":
        return Ragged(x_MD=x_MD, counts_L=counts_L)
    width, dim = max(counts), x_MD.shape[1]
    empty = x_MD.new_zeros(len(counts) * width, dim)
    filled = empty.index_copy(0, _slots(counts, x_MD.device), x_MD)
    return Padded(x_LCD=filled.view(len(counts), width, dim), counts_L=counts_L)


def taken_out(out: Rows, counts: Sequence[int]) -> Tensor:
    """The rows by expert again. Shapes: returns (M, D)."""
    if isinstance(out, Ragged):
        return out.x_MD
    return out.x_LCD.flatten(0, 1).index_select(0, _slots(counts, out.x_LCD.device))


def _slots(counts: Sequence[int], device: torch.device) -> Tensor:
    width = max(counts)
    return runs([expert * width for expert in range(len(counts))], counts, device)
