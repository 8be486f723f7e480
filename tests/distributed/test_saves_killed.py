"""kill -9 to one of two ranks that save, at once or beside their steps: at most the save in progress is lost.

The ranks are forked from one server that has imported torch, so that a round costs a fraction of a second. The server
is this file run as a program: for each line it reads it forks two, and prints `gone` after both have ended.
"""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist

from turnout.comm import World
from turnout.errors import TransportError
from turnout.experts.cut import Cut
from turnout.parallel.boxes import layout_of
from turnout.placement import Placement
from turnout.train.checkpoint import load
from turnout.train.checkpoint_pieces import Piece
from turnout.train.checkpoint_sharded import save_pieces
from turnout.train.recipe import LoopConfig
from turnout.train.saving import Saver
from turnout.train.state import RunState

Format = Literal["single", "sharded"]
ROUNDS, LONGEST_S = 6, 0.2
SHAPE = (4, 200)


def pieces(rank: int, mark: int) -> dict[str, dict[str, Piece]]:
    cut = Cut(shape=SHAPE, placement=Placement.even(4, 2))
    tensor = torch.full((2, 200), mark)
    return {
        "model": {"w": Piece(tensor=tensor, layout=layout_of(SHAPE, cut, rank, None))},
        "optimizer": {"w/exp_avg": Piece(tensor=tensor, layout=layout_of(SHAPE, cut, rank, None))},
    }


def mark_of(run: Path) -> int:
    """The mark of what loads; fails unless the pieces of both ranks and the meta are of one save."""
    loaded = load(run)
    marks = {int(mark) for file in loaded.files.values() for tensor in file.values() for mark in tensor.unique()}
    assert marks == {loaded.meta["mark"]}
    return loaded.meta["mark"]


class State:
    """Of a run, as much as a `Saver` asks for: all its numbers are the mark of the step."""

    def __init__(self, rank: int) -> None:
        self.rank, self.own = rank, pieces(rank, 0)

    def step(self, mark: int) -> None:
        """As an optimizer does it, in place: a save that is under way must not see it."""
        self.mark = mark
        for part in self.own.values():
            for piece in part.values():
                piece.tensor.fill_(mark)

    def capture_pieces(self) -> tuple[dict[str, dict[str, Piece]], dict[str, Any]]:
        return self.own, {"mark": self.mark}

    def capture(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        whole = {part: dict.fromkeys(own, torch.full(SHAPE, self.mark)) for part, own in self.own.items()}
        return (whole if self.rank == 0 else {}), {"mark": self.mark}


def save_beside(
    rank: int, world: World, run: Path, mark: int, checkpoint: Literal["single", "sharded"]
) -> Iterator[int]:
    """The marks of saves that are settled, while steps and what ranks say of them go on."""
    loop = LoopConfig(async_save=True, checkpoint=checkpoint, keep_last=2, timeout_s=30)
    saver, state = Saver(run, loop, world), State(rank)
    while True:
        mark += 1
        state.step(mark)
        saver.begin(mark, cast(RunState, state))
        later = mark
        while world.largest([float(saver.is_writing)])[0]:
            later += 1
            state.step(later)
        assert saver.settle(lambda: None) == (run / "checkpoints" / f"step-{mark}", None)
        yield mark


def save_at_once(rank: int, world: World, run: Path, mark: int) -> Iterator[int]:
    """The marks of saves that have returned."""
    while True:
        mark += 1
        save_pieces(run, mark, pieces(rank, mark), {"mark": mark}, keep_last=2, world=world)
        yield mark


def save_for_ever(rank: int, run: Path, store: str, mark: int, how: str) -> None:
    """Save until one of the two is killed; the first writes down each mark once its save is done."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    world = World(rank=rank, size=2, local_size=2)
    progress = os.open(run / "completed", os.O_WRONLY)
    os.write(1, f"ready {rank} {os.getpid()}\n".encode())
    with suppress(TransportError):
        for done in HOW[how](rank, world, run, mark):
            if rank == 0:
                os.pwrite(progress, struct.pack("<q", done), 0)


HOW: dict[str, Callable[[int, World, Path, int], Iterator[int]]] = {
    "at once": save_at_once,
    "pieces beside steps": partial(save_beside, checkpoint="sharded"),
    "one file beside steps": partial(save_beside, checkpoint="single"),
}


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        run, store, mark, how = json.loads(line)
        children = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    save_for_ever(rank, Path(run), store, mark, how)
                finally:
                    os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        os.write(1, b"gone\n")


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("how", HOW)
def test_a_rank_killed_at_a_random_moment_loses_at_most_the_save_in_progress(
    how: str, server: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    run, draw, hits, mark = tmp_path / "run", random.Random(0), Counter[str](), 0
    run.mkdir()
    (run / "completed").write_bytes(struct.pack("<q", 0))
    for number in range(8 * ROUNDS):
        # how many moments fall inside a save depends on the disk: go on until enough have
        if number >= ROUNDS and hits[".tmp"] >= 3:
            break
        server.stdin.write(json.dumps([str(run), str(tmp_path / f"store-{number}"), mark, how]) + "\n")
        server.stdin.flush()
        pids = dict(line.split()[1:] for line in (server.stdout.readline() for _ in range(2)))
        time.sleep(draw.uniform(0.05 if number == 0 else 0, LONGEST_S))
        if number == 0:
            while struct.unpack("<q", (run / "completed").read_bytes())[0] == 0:
                time.sleep(0.01)
        os.kill(int(pids[str(number % 2)]), signal.SIGKILL)
        assert server.stdout.readline() == "gone\n"
        hits.update({path.name.split("-")[0] for path in (run / "checkpoints").iterdir()})
        found = mark_of(run)
        assert found - struct.unpack("<q", (run / "completed").read_bytes())[0] in (0, 1)
        mark = found
        (run / "completed").write_bytes(struct.pack("<q", mark))
    assert hits[".tmp"] >= 3, hits


if __name__ == "__main__":
    serve()
