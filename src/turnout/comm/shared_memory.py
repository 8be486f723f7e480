"""All-to-alls of the ranks of one host through memory they share: senders write into the tensor that is received.

A socket copies twice and calls the kernel for every piece; this copies once. Tensors that are received lie in memory
without a name, which the kernel frees with the last process that has it, however it ends.
"""

import os
import platform
import select
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from turnout.comm.picks import starts
from turnout.comm.slabs import Slab, Slabs, mapped, segment
from turnout.errors import ConfigError

# of a mailbox, in numbers of 8 bytes, a cache line each: what the owner gives a sender, and what the sender answers
_LINE = 8
_CALL, _SLAB, _START, _BYTES = range(4)
_SPINS, _YIELDS_S, _PAUSE_S = 100, 2e-3, 5e-5
SETTING = "TURNOUT_SHARED_MEMORY"


def is_wanted() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get(SETTING, "0") not in ("", "0")


def why_not() -> str:
    """Why this machine cannot do it; empty if it can."""
    if sys.platform != "linux":
        return f"memory without a name is Linux's; this is {sys.platform}"
    # a flag is written after the rows it speaks of: on other processors that takes a fence, which Python has not
    return "" if platform.machine() == "x86_64" else f"{platform.machine()} may reorder writes; x86_64 does not"


def shared_line(group: ProcessGroup, *, timeout_s: float) -> "SharedLine | None":
    """The shared memory of a group's ranks; None if they are not all on one host. Every rank of the group calls it.

    Raises: ConfigError if this machine cannot share.
    """
    reason = why_not()
    if reason:
        raise ConfigError(f"ranks of one host cannot share memory here: {reason}; nearest legal: {SETTING}=0")
    box = segment(_mailbox_bytes(dist.get_world_size(group)))
    card = (_host(), os.getpid(), box.descriptor)
    cards: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(cards, card, group=group)
    if len({host for host, _, _ in cards}) > 1:
        return None
    line = SharedLine(box, [each[1:] for each in cards], dist.get_rank(group), timeout_s)
    # nobody's box may go before all have it
    dist.barrier(group=group)
    return line


class SharedLine:
    """One rank's end of it. Calls are the same in number and order on all ranks of the group, as of any collective."""

    def __init__(self, box: Slab, peers: Sequence[tuple[int, int]], rank: int, timeout_s: float) -> None:
        """`peers`: process and descriptor of every rank's mailbox, this one's among them."""
        self._rank, self._timeout_s, self._call = rank, timeout_s, 0
        self._slabs = Slabs()
        self._pids = [pid for pid, _ in peers]
        self._lives = {peer: os.pidfd_open(pid) for peer, pid in enumerate(self._pids) if peer != rank}
        maps = [box.memory if peer == rank else mapped(*where) for peer, where in enumerate(peers)]
        self._boxes = [memoryview(each).cast("q") for each in maps]
        self._known: dict[tuple[int, int], Tensor] = {}  # (rank, descriptor) -> its segment, as bytes

    def all_to_all(self, tensor: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """What the peers send here, peer by peer.

        Shapes: tensor (sum(sent), ...) contiguous, on the CPU; returns (sum(received), ...).
        Raises: RuntimeError if a peer has ended, is not here in time, or expects another number of bytes.
        """
        self._call += 1
        entry_bytes = tensor.element_size() * tensor.shape[1:].numel()
        from_peer, to_peer = ([entry_bytes * number for number in numbers] for numbers in (received, sent))
        slab, out = self._slabs.tensor(sum(from_peer), tensor, sum(received))
        mine, starts_in, starts_out = _as_bytes(tensor), starts(from_peer), starts(to_peer)
        for peer in self._others():
            self._give(peer, slab, starts_in[peer], from_peer[peer])
        start = starts_out[self._rank]
        self._write(_as_bytes(out), starts_in[self._rank], mine[start : start + to_peer[self._rank]])
        for peer in self._others():
            start = starts_out[peer]
            self._send(peer, mine[start : start + to_peer[peer]])
        for peer in self._others():
            self._wait(self._boxes[self._rank], self._answer(peer), peer)
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
        box[at + _CALL] = self._call

    def _send(self, peer: int, piece: Tensor) -> None:
        box, at = self._boxes[peer], self._rank * _LINE
        self._wait(box, at + _CALL, peer)
        if box[at + _BYTES] != len(piece):
            raise RuntimeError(
                f"rank {self._rank} of the group has {len(piece)} bytes for rank {peer}, "
                f"which expects {box[at + _BYTES]}"
            )
        if len(piece):
            self._write(self._segment_of(peer, box[at + _SLAB]), box[at + _START], piece)
        box[self._answer(self._rank)] = self._call

    def _answer(self, sender: int) -> int:
        return (len(self._boxes) + sender) * _LINE

    def _segment_of(self, peer: int, descriptor: int) -> Tensor:
        found = self._known.get((peer, descriptor))
        if found is None:
            found = torch.frombuffer(mapped(self._pids[peer], descriptor), dtype=torch.uint8)
            self._known[peer, descriptor] = found
        return found

    @staticmethod
    def _write(to: Tensor, start: int, piece: Tensor) -> None:
        if len(piece):
            to[start : start + len(piece)].copy_(piece)

    def _wait(self, box: memoryview, at: int, peer: int) -> None:
        """Until the number of this call is there: first busily, for a peer is often only a copy behind."""
        for _ in range(_SPINS):
            if box[at] >= self._call:
                return
        started = time.monotonic()
        while box[at] < self._call:
            waited_s = time.monotonic() - started
            if waited_s < _YIELDS_S:
                os.sched_yield()
                continue
            if self._has_ended(peer) and box[at] < self._call:
                raise RuntimeError(f"rank {peer} of the group has ended")
            if waited_s > self._timeout_s:
                raise RuntimeError(f"rank {peer} of the group was not there within {self._timeout_s:.0f} s")
            time.sleep(_PAUSE_S)

    def _has_ended(self, peer: int) -> bool:
        return bool(select.select([self._lives[peer]], [], [], 0)[0])


def _host() -> tuple[str, int, int]:
    """Alike for processes that reach each other's memory and are on one host, be it one of a lab."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read()
    return boot, os.stat("/proc/self/ns/pid").st_ino, os.stat("/proc/self/ns/net").st_ino


def _mailbox_bytes(size: int) -> int:
    return 2 * size * _LINE * 8


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
