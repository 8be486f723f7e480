"""Which groups of ranks share memory: those on one host, where it was tried and brought what it must.

`TURNOUT_SHARED_MEMORY` decides: 0 nobody; 1 all that are on one host, and where they cannot it is an error; by default
those that can, and where they cannot gloo does as it would have done.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from turnout.comm.mailboxes import mailbox
from turnout.comm.scattered import all_gather_single, reduce_scatter
from turnout.comm.shared_memory import SharedLine, host, why_not
from turnout.comm.world import World
from turnout.errors import ConfigError

SETTING = "TURNOUT_SHARED_MEMORY"
Wanted = Literal["never", "if proven", "always"]
_PROOF_S = 20.0  # for a rank to be there when a new line is tried


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The shared memory of this rank's groups."""

    of_group: Mapping[ProcessGroup, SharedLine] = field(default_factory=dict)
    reason: str = ""  # why ranks of one host share none that were to; empty if there is nothing to say

    def of(self, group: ProcessGroup | None) -> SharedLine | None:
        """The group's; None: it has none."""
        return None if group is None else self.of_group.get(group)

    def carries(self, tensor: Tensor, group: ProcessGroup) -> bool:
        """Whether memory is how a tensor gets to the group's ranks."""
        return tensor.device.type == "cpu" and group in self.of_group

    def all_reduce(self, flat: Tensor, group: ProcessGroup) -> None:
        """The sum over the group's ranks, in place. Shapes: flat (N,) contiguous."""
        if self.carries(flat, group):
            flat.copy_(self.of_group[group].all_reduce(flat))
        else:
            dist.all_reduce(flat, group=group)

    def all_gather(self, block: Tensor, group: ProcessGroup) -> Tensor:
        """What every rank of the group has, rank by rank. Shapes: block (N, ...) contiguous, alike on all ranks."""
        if self.carries(block, group):
            return self.of_group[group].all_gather(block)
        out = block.new_empty(group.size() * len(block), *block.shape[1:])
        all_gather_single(out, block, group=group)
        return out

    def reduce_scatter(self, sent: Tensor, group: ProcessGroup) -> Tensor:
        """This rank's run of the sum over ranks. Shapes: sent (size * N, ...) contiguous; returns (N, ...)."""
        size, rows = group.size(), len(sent) // group.size()
        if self.carries(sent, group):
            arrived = self.of_group[group].all_to_all(sent, [rows] * size, [rows] * size)
            return arrived.view(size, rows, *sent.shape[1:]).sum(dim=0)
        out = sent.new_empty(rows, *sent.shape[1:])
        reduce_scatter(out, sent, group)
        return out


def wanted() -> Wanted:
    """What the environment says."""
    value = os.environ.get(SETTING, "auto")
    return "if proven" if value in ("auto", "") else "never" if value == "0" else "always"


def intention() -> str:
    """What will carry rows, counts and sums between the ranks of a host, as the environment says."""
    want, reason = wanted(), why_not()
    if want == "never":
        return f"gloo, for {SETTING}=0"
    if reason and want == "if proven":
        return f"gloo: {reason}"
    return "memory that they share" + ("" if want == "always" else ", if it proves itself when they start, else gloo")


def try_here() -> str:
    """What is wrong with memory that two threads of this process share; empty if nothing is."""
    if reason := why_not():
        return reason
    try:
        boxes = [mailbox(2) for _ in range(2)]
        cards = [(os.getpid(), box.descriptor) for box in boxes]
        ends = [
            SharedLine(box, cards, rank, _PROOF_S, names=range(2), is_crowded=True) for rank, box in enumerate(boxes)
        ]
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    with ThreadPoolExecutor(max_workers=2) as threads:
        return "; ".join(filter(None, threads.map(_flaw, ends, range(2))))


def open_lines(
    groups: Iterable[ProcessGroup | None], world: World, *, timeout_s: float, want: Wanted, cuda: bool
) -> Lines:
    """Every rank calls it with its groups, which it made in the same order as all others.

    Raises: ConfigError on all ranks of the job if memory is wanted "always" and some group cannot share it, or if one
    rank wants it always and another never.
    """
    want, reason = _agreed(world.all(want))
    if want == "never" or (want == "if proven" and cuda):
        return Lines(reason=reason)
    of_group = {}
    for group in dict.fromkeys(groups):
        if group is None or not _on_one_node(group, world) or "gloo" not in dist.get_backend_config(group):
            continue
        try:
            line = shared_line(group, timeout_s=timeout_s, is_crowded=world.local_size > _cores())
        except ConfigError as error:
            line, reason = None, str(error)
        if line is not None:
            of_group[group] = line
    if want == "always":
        _require_none(world.all(reason))
    return Lines(of_group=of_group, reason=reason)


def _require_none(reasons: Sequence[str]) -> None:
    """Raises: ConfigError with the first reason: a rank that alone went on would wait for those that ended by it."""
    found = next(filter(None, reasons), None)
    if found is not None:
        raise ConfigError(found)


def _agreed(wants: Sequence[Wanted]) -> tuple[Wanted, str]:
    """What ranks want that may have been told different things, and why they share none that others were ready to.

    One that shared while another did not would wait for it forever.
    """
    if len(set(wants)) == 1:
        return wants[0], ""
    if "never" not in wants:
        return "always", ""
    against = f"{SETTING}=0 on rank {wants.index('never')}"
    if "always" in wants:
        raise ConfigError(
            f"{SETTING}=1 on rank {wants.index('always')} and {against}: ranks share memory together or not at all; "
            f"nearest legal: {SETTING}=0 on all"
        )
    return "never", against


def shared_line(group: ProcessGroup, *, timeout_s: float, is_crowded: bool = False) -> SharedLine | None:
    """The shared memory of a group's ranks; None if they are not all on one host. Every rank of the group calls it.

    Raises: ConfigError on all ranks if one of them cannot share, or what it then receives is not what was sent.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    box, here, reason = None, None, why_not()
    try:
        if not reason:
            box, here = mailbox(size), host()
    except OSError as error:
        reason = str(error)
    cards = _all((reason, here, os.getpid(), -1 if box is None else box.descriptor), group)
    names = dist.get_process_group_ranks(group)
    _settle([each[0] for each in cards], names)
    assert box is not None
    if len({each[1] for each in cards}) > 1:
        return None
    line = None
    try:
        line = SharedLine(box, [each[2:] for each in cards], rank, _PROOF_S, names=names, is_crowded=is_crowded)
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
    # nobody's box may go before all have it, and nobody begins before all can
    _settle(_all(reason, group), names)
    assert line is not None
    _settle(_all(_flaw(line, rank), group), names)
    line.wait_at_most(timeout_s)
    return line


def _settle(reasons: Sequence[str], names: Sequence[int]) -> None:
    found = next(((rank, reason) for rank, reason in zip(names, reasons, strict=True) if reason), None)
    if found is not None:
        raise ConfigError(
            f"ranks of one host cannot share memory here: rank {found[0]} of {list(names)}: {found[1]}; "
            f"nearest legal: {SETTING}=0"
        )


def _flaw(line: SharedLine, rank: int) -> str:
    """What is wrong with what a line brings; every rank tries it at once."""
    size = line.size
    # rank r sends s + 1 numbers to rank s, none to the rank after it
    sent = [0 if to == (rank + 1) % size else to + 1 for to in range(size)]
    received = [0 if rank == (peer + 1) % size else rank + 1 for peer in range(size)]
    tensor = torch.full((sum(sent),), float(rank))
    want = torch.arange(float(size)).repeat_interleave(torch.tensor(received))
    numbers = torch.arange(100.0) * (rank + 1)
    try:
        # all of it before anything is judged: nobody is to wait for a rank that has seen enough
        rows = [line.all_to_all(tensor, received, sent) for _ in range(2)]
        sums = [line.all_reduce(numbers, at_once_bytes=most) for most in (0, numbers.nbytes)]
    except (RuntimeError, OSError) as error:
        return str(error)
    if not all(torch.equal(each, want) for each in rows):
        return "an exchange brought something else than was sent"
    whole = torch.arange(100.0) * (size * (size + 1) // 2)
    return "" if all(torch.equal(each, whole) for each in sums) else "a sum is not that of what ranks have"


def _on_one_node(group: ProcessGroup, world: World) -> bool:
    return len({rank // world.local_size for rank in dist.get_process_group_ranks(group)}) == 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _all(value: Any, group: ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
