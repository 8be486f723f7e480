"""When and by whom a run's checkpoints are written: at once or in the background, by the first rank or by all.

In the background is a thread of ours, and not `torch.distributed.checkpoint.async_save`: that one writes through DCP
only, while a single file is the default here, and it is called experimental and changes between versions of torch. A
thread and not a process: hashing, writing and flushing release the interpreter's lock, and another process would need
the tensors a second time.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch.distributed as dist

from turnout.comm import World
from turnout.errors import CheckpointError
from turnout.train import checkpoint
from turnout.train.checkpoint_pieces import Piece
from turnout.train.checkpoint_sharded import save_pieces
from turnout.train.host_copy import HostCopy
from turnout.train.recipe import LoopConfig
from turnout.train.state import RunState

Outcome = tuple[Path | None, str | None]  # the checkpoint, and what went wrong
Write = Callable[[], Path | None]


class Saver:
    """The saves of one run, one after another; every rank has one, and all call the same methods in the same order."""

    def __init__(self, run: Path, loop: LoopConfig, world: World) -> None:
        self._run, self._loop, self._world = run, loop, world
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome = (None, None)
        self._crash: BaseException | None = None
        self.is_pending = False  # one was begun and not yet settled
        self._group: dist.ProcessGroup | None = None
        if loop.async_save and loop.checkpoint == "sharded" and world.size > 1:
            # what ranks say of the save must not come between what they say of the steps
            ranks, timeout = list(range(world.size)), timedelta(seconds=loop.timeout_s)
            self._group = cast(dist.ProcessGroup, dist.new_group(ranks, backend="gloo", timeout=timeout))

    @property
    def is_writing(self) -> bool:
        """Whether this rank still has to do with a save."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, state: RunState) -> None:
        """Write; with `loop.async_save` only copy, and write in the background. The last one must be settled.

        Raises: TransportError if a rank is gone.
        """
        assert not self.is_pending
        write = self._sharded(step, state) if self._loop.checkpoint == "sharded" else self._single(step, state)
        self.is_pending, self._outcome, self._crash = True, (None, None), None
        if not self._loop.async_save:
            self._try(write)
            return
        # whoever ends without waiting loses the save in progress and no other: nothing has to hold the process up
        self._thread = threading.Thread(target=self._try, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self, also: Callable[[], str | None]) -> Outcome:
        """Wait for the save; the same on every rank: its path, and why it failed.

        also: what the first rank does after it, and what went wrong with that.
        Raises: what is no failure of a disk, such as TransportError.
        """
        self.wait()
        self.is_pending = False
        if self._crash is not None:
            raise self._crash
        path, failure = self._outcome
        if self._world.is_first and failure is None:
            failure = also()
        return self._world.first((path, failure))

    def wait(self) -> str | None:
        """Wait for this rank's share of the save, if there is one; returns what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._outcome[1] if self.is_pending else None

    def _try(self, write: Write) -> None:
        try:
            self._outcome = (write(), None)
        except CheckpointError as error:
            self._outcome = (None, str(error))
        except BaseException as error:
            # a thread has nobody to raise it to
            self._crash = error

    def _single(self, step: int, state: RunState) -> Write:
        files, meta = state.capture()
        if not self._world.is_first:
            return lambda: None
        if self._loop.async_save:
            copies = self._host.take({f"{part}/{name}": t for part, own in files.items() for name, t in own.items()})
            files = {part: {name: copies[f"{part}/{name}"] for name in own} for part, own in files.items()}
        return lambda: checkpoint.save(self._run, step, files, meta, keep_last=self._loop.keep_last)

    def _sharded(self, step: int, state: RunState) -> Write:
        files, meta = state.capture_pieces()
        if self._loop.async_save:
            copies = self._host.take(
                {f"{part}/{name}": piece.tensor for part, own in files.items() for name, piece in own.items()}
            )
            files = {
                part: {name: Piece(tensor=copies[f"{part}/{name}"], layout=piece.layout) for name, piece in own.items()}
                for part, own in files.items()
            }
        keep_last, world, group = self._loop.keep_last, self._world, self._group
        return lambda: save_pieces(self._run, step, files, meta, keep_last=keep_last, world=world, group=group)
