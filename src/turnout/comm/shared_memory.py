"""Collectives of the ranks of one host through memory they share: senders write into the tensor that is received.

A socket copies twice and calls the kernel for every piece; this copies once. Tensors that are received lie in memory
without a name, which the kernel frees with the last process that has it, however it ends.
"""

import os
import platform
import sys
import weakref
from collections.abc import Sequence

from torch import Tensor

from turnout.comm.mailboxes import Given, Mailboxes
from turnout.comm.picks import starts
from turnout.comm.slabs import Slab, Slabs, close, copy

Piece = tuple[int, int]  # address and bytes
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
        self._mail = Mailboxes(box, peers, rank, names=names, is_crowded=is_crowded)
        self._timeout_s, self._slabs = timeout_s, Slabs()
        # what was received stays mapped for as long as it is wanted, whatever is closed
        weakref.finalize(self, close, self._slabs.descriptors).atexit = False

    def wait_at_most(self, timeout_s: float) -> None:
        """From here on so long for a peer."""
        self._timeout_s = timeout_s

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self._mail.size

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
        mine = shares[self._mail.rank]
        total = self.all_to_all(flat, [mine] * self.size, shares).view(self.size, mine).sum(dim=0, dtype=flat.dtype)
        pieces = [(total.data_ptr(), total.nbytes)] * self.size
        return self._exchange(total, pieces, [flat.element_size() * share for share in shares], len(flat))

    def _exchange(self, like: Tensor, pieces: Sequence[Piece], from_peer: Sequence[int], rows: int) -> Tensor:
        """So many bytes from every peer, and for each a piece: as a tensor of so many rows like those of `like`."""
        mail = self._mail
        try:
            slab, out = self._slabs.tensor(sum(from_peer), like, rows)
        except OSError as error:
            raise RuntimeError(f"no memory for {sum(from_peer):,} bytes that come here: {error}") from error
        starts_in = starts(from_peer)
        where, first = (0, 0) if slab is None else (slab.descriptor, slab.start)
        mail.give([Given(where, first + start, size) for start, size in zip(starts_in, from_peer, strict=True)])
        address, size = pieces[mail.rank]
        self._require_equal(size, mail.rank, from_peer[mail.rank])
        copy(out.data_ptr() + starts_in[mail.rank], address, size)
        for peer in mail.others():
            self._send(peer, *pieces[peer])
        for peer in mail.others():
            mail.await_answer(peer, self._timeout_s)
        return out

    def _send(self, peer: int, address: int, size: int) -> None:
        given = self._mail.given(peer, self._timeout_s)
        self._require_equal(size, peer, given.num_bytes)
        if size:
            copy(self._mail.address(peer, given), address, size)
        self._mail.answer(peer)

    def _require_equal(self, has: int, peer: int, expects: int) -> None:
        if has != expects:
            own, other = self._mail.name(self._mail.rank), self._mail.name(peer)
            raise RuntimeError(f"rank {own} has {has} bytes for rank {other}, which expects {expects}")


def host() -> tuple[str, int, int]:
    """Alike for processes that reach each other's memory and are on one host, be it one of a lab."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read()
    return boot, os.stat("/proc/self/ns/pid").st_ino, os.stat("/proc/self/ns/net").st_ino
