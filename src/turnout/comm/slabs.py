"""Memory without a name that processes of one host can share: tensors lie in it, and give it back when they go."""

import ctypes
import mmap
import os
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

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


def copy(to: int, source: int, num_bytes: int) -> None:
    """From one address to another, by the C library: below a megabyte up to three times as fast as torch's copy, whose
    call alone takes longer.

    However it stores, what is written after it is seen after it: Intel's manual, volume 3, 11.2.4, of string
    operations; after stores past the caches the library fences itself.
    """
    _memcpy()(to, source, num_bytes)


@cache
def _memcpy() -> Any:
    call = ctypes.CDLL(None).memcpy
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    return call


def address_of(memory: mmap.mmap) -> int:
    """Where it lies in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def close(descriptors: Sequence[int]) -> None:
    """Let go of segments; what is mapped stays."""
    for descriptor in descriptors:
        os.close(descriptor)


def mapped(pid: int, descriptor: int) -> mmap.mmap:
    """Another process's segment.

    Raises: OSError if it has ended, or belongs to another user.
    """
    with open(f"/proc/{pid}/fd/{descriptor}", "r+b", buffering=0) as file:
        return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)
