"""PyTorch's caching allocator over sizes alone: how many bytes it holds for a sequence of tensors made and dropped.

Source: https://github.com/pytorch/pytorch, c10/cuda/CUDACachingAllocator.cpp, at its default settings.
"""

from bisect import bisect_left, insort
from collections import deque

MIB = 2**20
_UNIT = 512  # sizes are whole multiples of it
_SMALL = MIB  # a tensor up to this lives in a pool of its own; no rest up to this is split off
_SHARED = 20 * MIB  # what is asked of the device for a tensor below 10 MiB; larger ones ask for whole 2 MiB


class Block:
    """A piece of device memory; neighbours came of one request."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, size: int, address: int) -> None:
        self.size, self.address, self.free = size, address, False
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """Bytes held from the device (`reserved`) and bytes of tensors (`live`, `peak`).

    A freed block joins its free neighbours and waits for a tensor that fits; the smallest that is large enough is cut.
    Nothing is ever given back, as long as the device is not full.
    """

    def __init__(self) -> None:
        self.reserved = self.live = self.peak = 0
        self._small = self._small_most = 0
        self._end = 0  # of the addresses given out
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._blocks: dict[int, Block] = {}  # free ones, by address
        self._late: deque[tuple[int, Block]] = deque()  # (the tensor made by when it is free, it)
        self._made = 0

    def make(self, size: float) -> Block:
        """Memory of a new tensor of `size` bytes."""
        size = -(-int(size) // _UNIT) * _UNIT
        self._made += 1
        while self._late and self._late[0][0] <= self._made:
            self.drop(self._late.popleft()[1])
        self.live += size
        self.peak = max(self.peak, self.live)
        if size <= _SMALL:
            self._small += size
            grown = self._small - self._small_most
            if grown > 0:
                self._small_most += grown
                self.reserved += grown
            return Block(size, -1)
        return self._cut(self._found(size), size)

    def drop(self, *blocks: Block) -> None:
        """The tensors are gone, and the memory is free at once."""
        for block in blocks:
            self.live -= block.size
            if block.address < 0:
                self._small -= block.size
                continue
            before, after = block.before, block.after
            if before is not None and before.free:
                self._take(before)
                block.address, block.size, block.before = before.address, block.size + before.size, before.before
                if block.before is not None:
                    block.before.after = block
            if after is not None and after.free:
                self._take(after)
                block.size, block.after = block.size + after.size, after.after
                if block.after is not None:
                    block.after.before = block
            self._put(block)

    def drop_late(self, block: Block, tensors: int) -> None:
        """The tensor is gone, but another stream may still read it: free after so many more tensors."""
        self._late.append((self._made + tensors, block))

    def wait(self) -> None:
        """All that was dropped is free: the device has caught up."""
        while self._late:
            self.drop(self._late.popleft()[1])

    def _found(self, size: int) -> Block:
        at = bisect_left(self._free, (size, -1))
        if at < len(self._free):
            _, address = self._free.pop(at)
            block = self._blocks.pop(address)
            block.free = False
            return block
        asked = _SHARED if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        block = Block(asked, self._end)
        self._end += asked + _UNIT
        self.reserved += asked
        return block

    def _cut(self, block: Block, size: int) -> Block:
        if block.size - size > _SMALL:
            rest = Block(block.size - size, block.address + size)
            rest.before, rest.after = block, block.after
            if rest.after is not None:
                rest.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        else:
            # a rest that is not cut off is the tensor's
            self.live += block.size - size
        return block

    def _put(self, block: Block) -> None:
        block.free = True
        insort(self._free, (block.size, block.address))
        self._blocks[block.address] = block

    def _take(self, block: Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.address))]
        del self._blocks[block.address]
        block.free = False
