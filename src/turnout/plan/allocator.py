"""PyTorch's caching allocator over sizes alone: how many bytes it holds for a sequence of tensors made and dropped.

Source: https://github.com/pytorch/pytorch, c10/cuda/CUDACachingAllocator.cpp, at its default settings.
"""

from bisect import bisect_left, insort
from collections import deque

MIB = 2**20
_UNIT = 512  # sizes are whole multiples of it
_SMALL = MIB  # a tensor up to this lives in a pool of its own
_SMALL_SHARED = 2 * MIB  # what is asked of the device for such a tensor
_SHARED = 20 * MIB  # and for one below 10 MiB; larger ones ask for whole 2 MiB


class Block:
    """A piece of device memory; neighbours came of one request."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, size: int, address: int, pool: "_Pool") -> None:
        self.size, self.address, self.free, self.pool = size, address, False, pool
        self.before: Block | None = None
        self.after: Block | None = None


class _Pool:
    """Free blocks that may serve the same tensors."""

    __slots__ = ("blocks", "free", "least_rest")

    def __init__(self, least_rest: int) -> None:
        self.free: list[tuple[int, int]] = []  # (size, address), sorted
        self.blocks: dict[int, Block] = {}  # free ones, by address
        self.least_rest = least_rest  # bytes that are worth splitting off

    def best(self, size: int) -> Block | None:
        """The smallest free block that is large enough, taken."""
        at = bisect_left(self.free, (size, -1))
        if at == len(self.free):
            return None
        _, address = self.free.pop(at)
        block = self.blocks.pop(address)
        block.free = False
        return block

    def put(self, block: Block) -> None:
        block.free = True
        insort(self.free, (block.size, block.address))
        self.blocks[block.address] = block

    def take(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]
        del self.blocks[block.address]
        block.free = False

    def give_back(self) -> int:
        """Bytes of free blocks that are all of what one request brought; they are gone."""
        whole = [block for block in self.blocks.values() if block.before is None and block.after is None]
        for block in whole:
            self.take(block)
        return sum(block.size for block in whole)


class CachingAllocator:
    """Bytes held from the device (`reserved`, at most `peak_reserved`) and bytes of tensors (`live`, `peak`).

    A freed block joins its free neighbours and waits for a tensor that fits; the smallest that is large enough is cut.
    Where the device would be full, what was dropped late is waited for, and pieces that are whole again are given back.
    """

    def __init__(self, device_bytes: float = float("inf")) -> None:
        self.device_bytes = device_bytes
        self.reserved = self.peak_reserved = self.live = self.peak = 0
        self._end = 0  # of the addresses given out
        self._small, self._large = _Pool(_UNIT), _Pool(_SMALL + 1)
        self._late: deque[tuple[float, Block]] = deque()  # (the launch by which it is free, it)
        self._launched = 0.0

    def make(self, size: float) -> Block:
        """Memory of a new tensor of `size` bytes."""
        size = max(1, -(-int(size) // _UNIT)) * _UNIT
        pool = self._small if size <= _SMALL else self._large
        block = self._cut(pool.best(size) or self._asked(size, pool), size)
        self.live += block.size
        self.peak = max(self.peak, self.live)
        return block

    def drop(self, *blocks: Block) -> None:
        """The tensors are gone, and the memory is free at once."""
        for block in blocks:
            self.live -= block.size
            before, after = block.before, block.after
            if before is not None and before.free:
                block.pool.take(before)
                block.address, block.size, block.before = before.address, block.size + before.size, before.before
                if block.before is not None:
                    block.before.after = block
            if after is not None and after.free:
                block.pool.take(after)
                block.size, block.after = block.size + after.size, after.after
                if block.after is not None:
                    block.after.before = block
            block.pool.put(block)

    def drop_late(self, block: Block, launches: int) -> None:
        """The tensor is gone, but another stream may still read it: free after so many more launches."""
        self._late.append((self._launched + launches, block))

    def launch(self, number: float) -> None:
        """So many launches more; of what was dropped late, that is free which the device has reached."""
        self._launched += number
        while self._late and self._late[0][0] <= self._launched:
            self.drop(self._late.popleft()[1])

    def wait(self) -> None:
        """All that was dropped is free: the device has caught up."""
        while self._late:
            self.drop(self._late.popleft()[1])

    def _asked(self, size: int, pool: _Pool) -> Block:
        """A new block of the device; where it would be full, one that is free once the device has caught up."""
        asked = _SMALL_SHARED if size <= _SMALL else _SHARED if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + asked > self.device_bytes:
            self.wait()
            found = pool.best(size)
            if found is not None:
                return found
            self.reserved -= self._small.give_back() + self._large.give_back()
        block = Block(asked, self._end, pool)
        self._end += asked + _UNIT
        self.reserved += asked
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _cut(self, block: Block, size: int) -> Block:
        """The block with what it has beyond `size` split off, where that is worth it; else the rest is the tensor's."""
        if block.size - size >= block.pool.least_rest:
            rest = Block(block.size - size, block.address + size, block.pool)
            rest.before, rest.after = block, block.after
            if rest.after is not None:
                rest.after.before = rest
            block.after, block.size = rest, size
            block.pool.put(rest)
        return block
