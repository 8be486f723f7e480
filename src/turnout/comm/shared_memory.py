"""Collectives of the ranks of one host through memory they share: senders write into the tensor that is received.

A socket copies twice and calls the kernel for every piece; this copies once. Tensors that are received lie in memory
without a name, which the kernel frees with the last process that has it, however it ends.
"""

import ctypes
import mmap
import os
import platform
import select
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from turnout.comm import futex
from turnout.comm.picks import starts
from turnout.comm.slabs import Slab, Slabs, mapped, segment

# of a mailbox, in numbers of 8 bytes, a cache line each: what the owner gives a sender, and what the sender answers
_LINE = 8
_CALL, _SLAB, _START, _BYTES = range(4)
Piece = tuple[int, int]  # address and bytes
_SPINS, _YIELDS_S = 100, 2e-3
_LOOK_S = 0.1  # how often one that waits looks whether its peer is alive
_CALLS = ("memfd_create", "pidfd_open")
_AT_ONCE_BYTES = 1 << 15  # a sum of so many bytes is worth one exchange, of more two


def why_not() -> str:
    """Why this machine cannot do it; empty if it can."""
    if sys.platform != "linux":
        return f"memory without a name is Linux's; this is {sys.platform}"
    if missing := [name for name in _CALLS if not hasattr(os, name)]:
        return f"this Python has no os.{missing[0]}: it was built for an older Linux"
    # a flag is written after the rows it speaks of: on other processors that takes a fence, which Python has not
    return "" if platform.machine() == "x86_64" else f"{platform.machine()} may reorder writes; x86_64 does not"


class SharedLine:
    """One rank's end of it. Calls are the same in number and order on all ranks of the group, as of any collective."""

    def __init__(
        self,
        box: Slab,
        peers: Sequence[tuple[int, int]],
        rank: int,
        timeout_s: float,
        *,
        names: Sequence[int],
        is_crowded: bool = False,
    ) -> None:
        """`peers`: process and descriptor of every rank's mailbox, this one's too; `names`: what errors call them.

        `is_crowded`: ranks are more than cores, so that one that waits for another may be in its way.
        Raises: OSError if a peer's memory cannot be reached.
        """
        self._rank, self._timeout_s, self._call = rank, timeout_s, 0
        self._busy_s = 0.0 if is_crowded else _YIELDS_S
        self._slabs = Slabs()
        self._pids = [pid for pid, _ in peers]
        self._names = names
        lives = {os.pidfd_open(pid): peer for peer, pid in enumerate(self._pids) if peer != rank}
        # select knows no descriptor beyond 1,023
        self._lives, self._ended = lives, select.poll()
        for life in lives:
            self._ended.register(life, select.POLLIN)
        maps = [box.memory if peer == rank else mapped(*where) for peer, where in enumerate(peers)]
        self._boxes = [memoryview(each).cast("q") for each in maps]
        self._bases = [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in maps]
        self._known: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}  # (rank, descriptor) -> where its segment is
        self._slabs.descriptors += [box.descriptor, *lives]
        # what was received stays mapped for as long as it is wanted, whatever is closed
        weakref.finalize(self, _close, self._slabs.descriptors).atexit = False

    def wait_at_most(self, timeout_s: float) -> None:
        """From here on so long for a peer."""
        self._timeout_s = timeout_s

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self._boxes)

    def all_to_all(self, tensor: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """What the peers send here, peer by peer.

        Shapes: tensor (sum(sent), ...), on the CPU; returns (sum(received), ...).
        Raises: RuntimeError if a peer has ended, is not here in time, or expects another number of bytes.
        """
        tensor = tensor.contiguous()
        entry_bytes = tensor.element_size() * tensor.shape[1:].numel()
        to_peer = [entry_bytes * number for number in sent]
        if sum(to_peer) != tensor.nbytes:
            raise RuntimeError(f"{sum(to_peer)} bytes are to be sent of a tensor that has {tensor.nbytes}")
        first = tensor.data_ptr()
        pieces = [(first + start, size) for start, size in zip(starts(to_peer), to_peer, strict=True)]
        return self._exchange(tensor, pieces, [entry_bytes * number for number in received], sum(received))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """What every rank has, rank by rank.

        Shapes: tensor (N, ...), on the CPU, alike on all ranks; returns (size * N, ...).
        Raises: as `all_to_all`.
        """
        tensor = tensor.contiguous()
        pieces = [(tensor.data_ptr(), tensor.nbytes)] * self.size
        return self._exchange(tensor, pieces, [tensor.nbytes] * self.size, self.size * len(tensor))

    def all_reduce(self, flat: Tensor, *, at_once_bytes: int = _AT_ONCE_BYTES) -> Tensor:
        """The sum over ranks, added in their order: every rank has the same bits.

        Up to `at_once_bytes` everybody gets everything; of more each rank adds up a share, which then goes to all.

        Shapes: flat (N,) contiguous, on the CPU, alike on all ranks; returns (N,).
        Raises: as `all_to_all`.
        """
        if flat.nbytes <= at_once_bytes:
            return self.all_gather(flat).view(self.size, len(flat)).sum(dim=0, dtype=flat.dtype)
        shares = [len(part) for part in flat.tensor_split(self.size)]
        mine = shares[self._rank]
        total = self.all_to_all(flat, [mine] * self.size, shares).view(self.size, mine).sum(dim=0, dtype=flat.dtype)
        pieces = [(total.data_ptr(), total.nbytes)] * self.size
        return self._exchange(total, pieces, [flat.element_size() * share for share in shares], len(flat))

    def _exchange(self, like: Tensor, pieces: Sequence[Piece], from_peer: Sequence[int], rows: int) -> Tensor:
        """So many bytes from every peer, and for each a piece: as a tensor of so many rows like those of `like`."""
        self._call += 1
        try:
            slab, out = self._slabs.tensor(sum(from_peer), like, rows)
        except OSError as error:
            raise RuntimeError(f"no memory for {sum(from_peer):,} bytes that come here: {error}") from error
        starts_in = starts(from_peer)
        for peer in self._others():
            self._give(peer, slab, starts_in[peer], from_peer[peer])
        address, size = pieces[self._rank]
        self._require_equal(size, self._rank, from_peer[self._rank])
        _copy()(out.data_ptr() + starts_in[self._rank], address, size)
        for peer in self._others():
            self._send(peer, pieces[peer])
        for peer in self._others():
            self._wait(self._rank, self._answer(peer), peer)
        return out

    def _others(self) -> Iterator[int]:
        """The peers, each rank beginning with the one after it: nobody is written to by all at once."""
        size = len(self._boxes)
        return ((self._rank + step) % size for step in range(1, size))

    def _give(self, peer: int, slab: Slab | None, start: int, num_bytes: int) -> None:
        """Where the peer may write in this call; the number of the call comes last."""
        box, at = self._boxes[self._rank], peer * _LINE
        box[at + _BYTES] = num_bytes
        if slab is not None:
            box[at + _SLAB], box[at + _START] = slab.descriptor, slab.start + start
        self._say(self._rank, at + _CALL)

    def _send(self, peer: int, piece: Piece) -> None:
        box, at = self._boxes[peer], self._rank * _LINE
        self._wait(peer, at + _CALL, peer)
        address, size = piece
        self._require_equal(size, peer, box[at + _BYTES])
        if size:
            _copy()(self._segment_of(peer, box[at + _SLAB]) + box[at + _START], address, size)
        self._say(peer, self._answer(self._rank))

    def _require_equal(self, has: int, peer: int, expects: int) -> None:
        if has != expects:
            raise RuntimeError(
                f"rank {self._names[self._rank]} has {has} bytes for rank {self._names[peer]}, which expects {expects}"
            )

    def _answer(self, sender: int) -> int:
        return (len(self._boxes) + sender) * _LINE

    def _segment_of(self, peer: int, descriptor: int) -> int:
        found = self._known.get((peer, descriptor))
        if found is None:
            try:
                memory = mapped(self._pids[peer], descriptor)
            except OSError as error:
                # it went with its process
                self._require_alive()
                raise RuntimeError(f"the memory of rank {self._names[peer]} cannot be reached: {error}") from error
            base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            found = self._known[peer, descriptor] = base, memory
        return found[0]

    def _say(self, owner: int, at: int) -> None:
        """The number of this call, in the box of that rank, and to who waits for it there."""
        self._boxes[owner][at] = self._call
        futex.wake(self._bases[owner] + 8 * at)

    def _wait(self, owner: int, at: int, peer: int) -> None:
        """Until the number of this call is there: first busily, for a peer is often only a copy behind."""
        box = self._boxes[owner]
        for _ in range(_SPINS):
            if box[at] >= self._call:
                return
        started = time.monotonic()
        while (seen := box[at]) < self._call:
            waited_s = time.monotonic() - started
            if waited_s < self._busy_s:
                os.sched_yield()
                continue
            self._require_alive()
            if waited_s > self._timeout_s:
                raise RuntimeError(f"rank {self._names[peer]} was not there within {self._timeout_s:.0f} s")
            # the lower half of the number, which is the first in memory; it changes with every call
            futex.wait(self._bases[owner] + 8 * at, seen, _LOOK_S)

    def _require_alive(self) -> None:
        """Raises: RuntimeError if a rank has ended and owes this call its rows, whoever is waited for."""
        ended = [self._lives[life] for life, _ in self._ended.poll(0)]
        # asked second: what one did before it ended is there
        owing = [peer for peer in ended if self._boxes[self._rank][self._answer(peer)] < self._call]
        if owing:
            ranks = " and ".join(f"rank {self._names[peer]}" for peer in sorted(owing))
            raise RuntimeError(f"{ranks} {'has' if len(owing) == 1 else 'have'} ended")


def mailbox(size: int) -> Slab:
    """One rank's, of a group of so many."""
    return segment(2 * size * _LINE * 8)


def host() -> tuple[str, int, int]:
    """Alike for processes that reach each other's memory and are on one host, be it one of a lab."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read()
    return boot, os.stat("/proc/self/ns/pid").st_ino, os.stat("/proc/self/ns/net").st_ino


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@cache
def _copy() -> Any:
    """The C library's memcpy: for pieces below a megabyte up to three times as fast as torch's copy, and no call first.

    However it stores, what is written after it is seen after it: Intel's manual, volume 3, 11.2.4, of string
    operations; of stores past the caches the library fences itself.
    """
    call = ctypes.CDLL(None).memcpy
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    call.restype = ctypes.c_void_p
    return call
