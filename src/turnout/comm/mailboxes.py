"""Mailboxes in memory that the ranks of a host share: who gives what where, who has answered, and who is still there.

Every rank has one, which all write to. A call has one number on all ranks; a number is written after what it speaks of,
and x86_64 shows writes in their order.
"""

import mmap
import os
import select
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from turnout.comm import futex
from turnout.comm.slabs import Slab, address_of, close, mapped, segment

# in numbers of 8 bytes: a cache line each for the call in which its owner gave, for what it gives every rank, and for
# what every rank has answered
_LINE = 8
_DESCRIPTOR, _START, _BYTES = range(3)
_SPINS, _YIELDS_S = 100, 2e-3
_LOOK_S = 0.1  # how often one that waits looks whether its peers are alive


class Given(NamedTuple):
    """Where in the memory of another rank this one may write."""

    descriptor: int  # of its segment
    start: int
    num_bytes: int


class Mailboxes:
    """The mailboxes of a group's ranks, as one of them sees them."""

    def __init__(
        self, box: Slab, peers: Sequence[tuple[int, int]], rank: int, *, names: Sequence[int], is_crowded: bool
    ) -> None:
        """As `SharedLine`. Raises: OSError if a peer's memory cannot be reached."""
        self.rank, self.size = rank, len(peers)
        self._names, self._call = names, 0
        self._busy_s = 0.0 if is_crowded else _YIELDS_S
        self._pids = [pid for pid, _ in peers]
        lives = {os.pidfd_open(pid): peer for peer, pid in enumerate(self._pids) if peer != rank}
        # select knows no descriptor beyond 1,023
        self._lives, self._ended = lives, select.poll()
        for life in lives:
            self._ended.register(life, select.POLLIN)
        maps = [box.memory if peer == rank else mapped(*where) for peer, where in enumerate(peers)]
        self._boxes = [memoryview(each).cast("q") for each in maps]
        self._bases = [address_of(each) for each in maps]
        self._segments: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}  # (rank, descriptor) -> where it is mapped
        weakref.finalize(self, close, [box.descriptor, *lives]).atexit = False

    def name(self, place: int) -> int:
        """The number in the job of the rank at that place in the group."""
        return self._names[place]

    def others(self) -> Iterator[int]:
        """The peers, each rank beginning with the one after it: nobody is written to by all at once."""
        return ((self.rank + step) % self.size for step in range(1, self.size))

    def give(self, each: Sequence[Given]) -> None:
        """The next call begins: where every rank may write here, this one's own entry being left out."""
        self._call += 1
        box = self._boxes[self.rank]
        for peer in self.others():
            at = (1 + peer) * _LINE
            box[at + _DESCRIPTOR], box[at + _START], box[at + _BYTES] = each[peer]
        self._say(self.rank, 0)

    def given(self, peer: int, timeout_s: float) -> Given:
        """Where this rank may write there. Raises: RuntimeError if that one has ended, or gives nothing in time."""
        self._wait(peer, 0, peer, timeout_s)
        at = (1 + self.rank) * _LINE
        return Given(*self._boxes[peer][at : at + len(Given._fields)])

    def answer(self, peer: int) -> None:
        """It is written."""
        self._say(peer, self._answer_of(self.rank))

    def await_answer(self, peer: int, timeout_s: float) -> None:
        """Until that one has written here. Raises: as `given`."""
        self._wait(self.rank, self._answer_of(peer), peer, timeout_s)

    def address(self, peer: int, given: Given) -> int:
        """Where that is in the memory of this process. Raises: RuntimeError if it cannot be reached."""
        found = self._segments.get((peer, given.descriptor))
        if found is None:
            try:
                memory = mapped(self._pids[peer], given.descriptor)
            except OSError as error:
                # it went with its process
                self._require_alive()
                raise RuntimeError(f"the memory of rank {self.name(peer)} cannot be reached: {error}") from error
            found = self._segments[peer, given.descriptor] = address_of(memory), memory
        return found[0] + given.start

    def _answer_of(self, sender: int) -> int:
        return (1 + self.size + sender) * _LINE

    def _say(self, owner: int, at: int) -> None:
        """The number of this call, in the box of that rank, and to who waits for it there."""
        self._boxes[owner][at] = self._call
        futex.wake(self._bases[owner] + 8 * at)

    def _wait(self, owner: int, at: int, peer: int, timeout_s: float) -> None:
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
            if waited_s > self._busy_s + _LOOK_S:
                self._require_alive()
            if waited_s > timeout_s:
                raise RuntimeError(f"rank {self.name(peer)} was not there within {timeout_s:.0f} s")
            # the lower half of the number, which is the first in memory; it changes with every call
            futex.wait(self._bases[owner] + 8 * at, seen, _LOOK_S)

    def _require_alive(self) -> None:
        """Raises: RuntimeError if a rank has ended and owes this call its rows, whoever is waited for."""
        ended = [self._lives[life] for life, _ in self._ended.poll(0)]
        # asked second: what one did before it ended is there
        owing = [peer for peer in ended if self._boxes[self.rank][self._answer_of(peer)] < self._call]
        if owing:
            ranks = " and ".join(f"rank {self.name(peer)}" for peer in sorted(owing))
            raise RuntimeError(f"{ranks} {'has' if len(owing) == 1 else 'have'} ended")


def mailbox(size: int) -> Slab:
    """One rank's, of a group of so many."""
    return segment((1 + 2 * size) * _LINE * 8)
