"""Who keeps whom waiting: every rank tells a common store where it is, and one that waits long says for whom."""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore

from turnout.comm.ledger import PIPELINE, Ledger, Whereabouts
from turnout.comm.world import World

_STORE_TIMEOUT_S = 30.0
_SILENCES = 3  # tellings that are left out before a rank counts as silent
# why a rank is not there, the likeliest cause of a stall first
_SILENT, _BEHIND, _WAITING = range(3)


class Watch:
    """A context in which this rank speaks up once it has waited `patience_s` in a collective, once for each.

    It names the ranks that are not there, the likeliest cause first: those that have told nothing for a while, those
    that are still before the collective, and those that wait in an earlier one, each with what it did last. It ends
    nothing: the timeout of the group does.
    Two threads: a store whose host is stopped must not silence the one that speaks.
    """

    _store: Store

    def __init__(
        self,
        world: World,
        ledger: Ledger,
        say: Callable[[str], None],
        *,
        patience_s: float = 20.0,
        every_s: float = 2.0,
    ) -> None:
        self._world, self._ledger, self._say = world, ledger, say
        self._patience_s, self._every_s = patience_s, every_s
        self._stopped = threading.Event()
        self._seen: Mapping[int, Mapping[str, Any]] = {}  # rank -> what it told last
        self._heard_s = time.time()  # when that was
        self._told = -1  # number of the collective of which something was said

    def __enter__(self) -> "Watch":
        """Every rank enters."""
        if self._world.size > 1:
            self._store = _open_store(self._world)
            self._tell_store()
            self._world.barrier()
            self._look()
            for work in (self._keep_telling, self._keep_looking):
                threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _keep_telling(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                self._tell_store()
                self._look()
            except RuntimeError:
                # the store's host has ended
                return

    def _keep_looking(self) -> None:
        while not self._stopped.wait(self._every_s):
            where = self._ledger.where
            waited_s = time.time() - where.since_s
            if where.is_inside and waited_s > self._patience_s and where.number != self._told:
                self._told = where.number
                self._say(self._words(where, waited_s))

    def _tell_store(self) -> None:
        told = {**asdict(self._ledger.where), "told_s": time.time()}
        self._store.set(str(self._world.rank), json.dumps(told))

    def _look(self) -> None:
        ranks = range(self._world.size)
        values = self._store.multi_get([str(rank) for rank in ranks])
        self._seen = {rank: json.loads(value) for rank, value in zip(ranks, values, strict=True)}
        self._heard_s = time.time()

    def _words(self, where: Whereabouts, waited_s: float) -> str:
        place = f"in step {where.step}, in the {where.collective}"
        return f"rank {self._world.rank} has waited {waited_s:.0f} s {place}: {self._absent(where)}"

    def _absent(self, where: Whereabouts) -> str:
        unheard_s = time.time() - self._heard_s
        if unheard_s > _SILENCES * self._every_s:
            # what the others told since then is not known, so nothing is said of them
            return f"rank 0, which keeps what the ranks tell, has not answered for {unheard_s:.0f} s"
        others = [(rank, told) for rank, told in self._seen.items() if rank != self._world.rank]
        found = sorted(absence for rank, told in others if (absence := self._absence(rank, told, where)))
        return "; ".join(words for *_, words in found) or "every rank is there: the network between them is not"

    def _absence(self, rank: int, told: Mapping[str, Any], where: Whereabouts) -> tuple[int, int, str] | None:
        """Why a rank is not in the collective, after its place among the causes; nothing if it is there."""
        silent_s = time.time() - told["told_s"]
        last = f"in step {told['step']}, {'in' if told['is_inside'] else 'after'} the {told['collective']}"
        if silent_s > _SILENCES * self._every_s:
            return _SILENT, rank, f"rank {rank} has told nothing for {silent_s:.0f} s, last {last}"
        if not _is_behind(told, where):
            return None
        if told["is_inside"]:
            return _WAITING, rank, f"rank {rank} waits elsewhere, {last}"
        return _BEHIND, rank, f"rank {rank} is not there yet: it is {last}"


def _is_behind(told: Mapping[str, Any], where: Whereabouts) -> bool:
    """Whether one who is `where` waits for that rank; of a pipeline for those alone that keep a micro-batch."""
    if where.stage < 0 or told["stage"] < 0:
        return told["number"] < where.number
    is_like = told["stage"] == where.stage
    if where.collective == PIPELINE:
        return not is_like and not told["is_inside"]
    return is_like and told["number"] < where.number


def _open_store(world: World) -> Store:
    """A store of its own: one that is waited for must hold up nothing else."""
    host, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=_STORE_TIMEOUT_S)
    if world.is_first:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        world.first(store.port)
        return store
    return TCPStore(host, world.first(0), is_master=False, timeout=timeout)
