"""The byte ledger: what this rank handed to each collective of its expert layers."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from turnout.alltoall import Traffic
from turnout.topology import Mesh

Phase = Literal["forward", "backward"]
# what a program moves; rows between slices of the same experts; weights that are gathered; what must be known before:
# counts of rows, or a capacity; activations of tensor-parallel layers; what pipeline stages pass on; experts that
# change their rank; shards of parameters that FSDP gathers (phase forward, whichever pass needs them) and of gradients
# that it sums; sums of those over copies; gradients of experts that several ranks of a group hold. Of slices, weights,
# moves and twins the ranks are those of the whole expert group, of the others those of the tensor group, of the
# pipeline, of the shards and of the copies.
Kind = Literal["rows", "slices", "weights", "counts", "tensor", "stages", "moves", "shards", "copies", "twins"]
PIPELINE = "pipeline of stages"
Sent = dict[int, list[int]]  # rank of the expert group -> [bytes, messages]


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where a rank is; ranks of a job go through the same collectives, so their numbers compare."""

    step: int = 0
    collective: str = "start"  # the last one it entered
    is_inside: bool = False
    number: int = 0  # collectives entered so far
    since_s: float = 0.0  # time of day when it entered or left
    stage: int = -1  # its place in a pipeline that runs: numbers of other places do not compare with its own


class Ledger:
    """Bytes and messages to each rank of the expert group, added up by layer, phase and kind until `clear`.

    What stays on its rank is not in it; an empty message is. `where` says in which collective this rank is.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[str, Phase, Kind], Sent] = {}
        self._host_copies: dict[str, int] = defaultdict(int)
        self.where = Whereabouts()

    def note(self, layer: str, phase: Phase, kind: Kind, sent_bytes: Mapping[int, int]) -> None:
        """One message to each of these ranks."""
        entries = self._sent.setdefault((layer, phase, kind), {})
        for rank, size in sent_bytes.items():
            entry = entries.setdefault(rank, [0, 0])
            entry[0] += size
            entry[1] += 1

    @contextmanager
    def inside(self, collective: str, *, step: int | None = None) -> Iterator[None]:
        """While the context lasts this rank is in that collective; `step` begins one."""
        before = self.where
        number, step = before.number + 1, before.step if step is None else step
        self.where = Whereabouts(
            step=step, collective=collective, is_inside=True, number=number, since_s=time.time(), stage=before.stage
        )
        yield
        self.where = replace(self.where, is_inside=False, since_s=time.time())

    @contextmanager
    def pipelined(self, stage: int) -> Iterator[None]:
        """While the context lasts this rank waits for other stages, but where it is `computing`.

        However many collectives are inside, it is one for all ranks after.
        """
        entered = replace(self.where, collective=PIPELINE, number=self.where.number + 1)
        self.where = replace(entered, is_inside=True, since_s=time.time(), stage=stage)
        yield
        self.where = replace(entered, is_inside=False, since_s=time.time())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While the context lasts this rank's stage has what it waited for."""
        self.where = replace(self.where, is_inside=False, since_s=time.time())
        yield
        self.where = replace(self.where, collective=PIPELINE, is_inside=True, since_s=time.time())

    def note_host_copy(self, layer: str) -> None:
        """A copy from the device that the host waited for."""
        self._host_copies[layer] += 1

    def sent(self, layer: str, phase: Phase, kind: Kind = "rows") -> Sent:
        """Rank -> [bytes, messages]."""
        return {rank: list(entry) for rank, entry in self._sent.get((layer, phase, kind), {}).items()}

    def traffic(self, rank: int, mesh: Mesh, *, kind: Kind = "rows") -> Traffic:
        """All of a kind by class of link, as `rank` of `mesh` sent it."""
        total = Traffic()
        for (_, _, of_kind), entries in self._sent.items():
            for to, (sent_bytes, messages) in entries.items() if of_kind == kind else ():
                total += Traffic.between(rank, to, mesh, sent_bytes, messages)
        return total

    def host_copies(self, layer: str) -> int:
        """Copies the host waited for in a layer."""
        return self._host_copies.get(layer, 0)

    def clear(self) -> None:
        """Begin anew, as at each step."""
        self._sent.clear()
        self._host_copies.clear()
