"""Rows of a tensor still to be picked: indices that verbs compose, so that each exchange gathers its rows once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from turnout.segments import Segments, permutation, segments_of


@dataclass(frozen=True, kw_only=True)
class Picks:
    """Row m is row index_M[m] of a tensor of num_rows rows."""

    index_M: Tensor
    num_rows: int
    one_each: bool  # a permutation
    known: Segments | None = None  # the same as runs, where someone has them already

    def then(self, later: "Picks") -> "Picks":
        """Pick from here, and from what that gives pick again."""
        return Picks(
            index_M=self.index_M.index_select(0, later.index_M),
            num_rows=self.num_rows,
            one_each=self.one_each and later.one_each,
        )

    @cached_property
    def segments(self) -> Segments:
        """The picks as runs of the rows they come from."""
        if self.known is not None:
            return self.known
        return permutation(self.index_M) if self.one_each else segments_of(self.index_M, self.num_rows)


def placed(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers of the host on the device, int64; the host does not wait, as torch.tensor(..., device=...) would."""
    return torch.tensor(_lists(values), dtype=torch.int64).to(device, non_blocking=True)


def _lists(values: Sequence[Any]) -> list[Any]:
    return [list(value) if isinstance(value, Sequence) else value for value in values]


def runs(start: Sequence[int], length: Sequence[int], device: torch.device) -> Tensor:
    """start, start + 1, ... of each run, one run after another; nothing is read back from the device.

    Shapes: as many starts as lengths; returns (sum of lengths,) int64.
    """
    start_B, length_B = placed([start, length], device).unbind()
    total = sum(length)
    shift_B = start_B - (length_B.cumsum(0) - length_B)
    return shift_B.repeat_interleave(length_B, output_size=total) + torch.arange(total, device=device)


def spread(values: Sequence[int], length: Sequence[int], device: torch.device) -> Tensor:
    """Each value as many times as its length says. Shapes: returns (sum of lengths,) int64."""
    value_B, length_B = placed([values, length], device).unbind()
    return value_B.repeat_interleave(length_B, output_size=sum(length))


def starts(length: Sequence[int]) -> list[int]:
    """Where each of a row of runs begins."""
    ends, total = [], 0
    for each in length:
        ends.append(total)
        total += each
    return ends
