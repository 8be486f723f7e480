"""Memory without a name that processes of one host can share: tensors lie in it, and give it back when they go."""

import mmap
import os
import weakref
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_BYTES = 1 << 12
_SEGMENT_BYTES = 1 << 26  # only what is written takes memory


@dataclass(frozen=True, kw_only=True)
class Slab:
    """A part of a segment of this process, which others reach by its number and `descriptor`."""

    descriptor: int
    memory: mmap.mmap
    start: int = 0


class Slabs:
    """Slabs of this process, in sizes of powers of two; one that no tensor lies in any more is used again."""

    def __init__(self) -> None:
        self._free: dict[int, list[Slab]] = defaultdict(list)
        self._segment: Slab | None = None  # its start: what is not yet given away
        self.descriptors: list[int] = []  # of all segments; who owns this closes them when no peer will ask any more

    def tensor(self, num_bytes: int, like: Tensor, rows: int) -> tuple[Slab | None, Tensor]:
        """A tensor of so many rows like those of `like`, and the slab it lies in; None if it is empty."""
        if num_bytes == 0:
            return None, like.new_empty(rows, *like.shape[1:])
        size = max(_SMALLEST_BYTES, 1 << (num_bytes - 1).bit_length())
        free = self._free[size]
        slab = free.pop() if free else self._cut(size)
        # the tensor's storage keeps this alive, and nothing else does
        lease = memoryview(slab.memory)[slab.start : slab.start + size]
        weakref.finalize(lease, free.append, slab).atexit = False
        flat = torch.frombuffer(lease, dtype=like.dtype, count=num_bytes // like.element_size())
        return slab, flat.view(rows, *like.shape[1:])

    def _cut(self, size: int) -> Slab:
        """From the last segment, or a new one where that has no room."""
        last = self._segment
        if last is None or last.start + size > len(last.memory):
            last = segment(max(size, _SEGMENT_BYTES))
            self.descriptors.append(last.descriptor)
        descriptor, memory = last.descriptor, last.memory
        self._segment = Slab(descriptor=descriptor, memory=memory, start=last.start + size)
        return Slab(descriptor=descriptor, memory=memory, start=last.start)


def segment(num_bytes: int) -> Slab:
    """New memory, full of zeros."""
    descriptor = os.memfd_create("turnout", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    return Slab(descriptor=descriptor, memory=mmap.mmap(descriptor, num_bytes))


def mapped(pid: int, descriptor: int) -> mmap.mmap:
    """Another process's segment.

    Raises: OSError if it has ended, or belongs to another user.
    """
    with open(f"/proc/{pid}/fd/{descriptor}", "r+b", buffering=0) as file:
        return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)
