"""kill -9 at random moments: always a loadable checkpoint, never a mixed one, at most the save in progress lost.

The processes to kill are forked from one server that has imported torch, so that each costs milliseconds. The
server is this file run as a program: it forks a child for each line it reads, and prints `gone` after its death.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turnout.comm import World
from turnout.errors import CheckpointError
from turnout.train.checkpoint import load, save
from turnout.train.checkpoint_pieces import Piece
from turnout.train.checkpoint_sharded import save_pieces, whole_of

KILLS = 100  # while saving, and as many while cleaning up


def contents(mark: int) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"w": torch.full((500,), mark), "b": torch.tensor(mark)},
        "optimizer": {"w/exp_avg": torch.full((500,), mark)},
        "rng": {"torch_cpu": torch.full((200,), mark)},
    }


def mark_of(run: Path) -> int:
    """The mark of what loads; fails unless every tensor and the meta are of one save."""
    loaded = load(run)
    marks = {int(mark) for file in loaded.files.values() for t in file.values() for mark in t.unique()}
    assert marks == {loaded.meta["mark"]}
    return loaded.meta["mark"]


def completed(run: Path) -> int:
    return struct.unpack("<q", (run / "completed").read_bytes())[0]


def tell(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def save_for_ever(run: Path, again: bool) -> None:
    """Resume, then save until killed, writing down each mark once its save has returned."""
    mark = mark_of(run)
    progress = os.open(run / "completed", os.O_WRONLY)
    tell("ready", os.getpid())
    while True:
        mark += 1
        # every other one in pieces
        keep = save if mark % 2 else save_in_pieces
        keep(run, 5 if again else mark, contents(mark), {"mark": mark}, keep_last=1 if again else 2)
        os.pwrite(progress, struct.pack("<q", mark), 0)


def save_in_pieces(
    run: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], meta: dict[str, Any], *, keep_last: int
) -> None:
    pieces = {
        part: {name: Piece(tensor=t, layout=whole_of(part, name, tuple(t.shape))) for name, t in own.items()}
        for part, own in files.items()
    }
    save_pieces(run, step, pieces, meta, keep_last=keep_last, world=World())


def save_with_slow_deletion(run: Path, again: bool) -> None:
    """The same with each deletion slowed down and announced, so that kills hit the cleaning up."""
    rmtree, plain = shutil.rmtree, {name: getattr(os, name) for name in ("unlink", "rmdir")}

    def slowly(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: (time.sleep(0.002), plain[name](*args, **kwargs))[1]

    def announced(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            tell("deleting", os.getpid())
            rmtree(path, ignore_errors=ignore_errors)
            tell("deleted")

    for name in plain:
        setattr(os, name, slowly(name))
    setattr(shutil, "rmtree", announced)  # noqa: B010
    save_for_ever(run, again)


def save_under_a_limit(run: Path, _: bool) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        save(run, 6, contents(6), {"mark": 6}, keep_last=2)
        tell("saved")
    except CheckpointError as error:
        tell("error", error)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        child, run, again = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                globals()[child](Path(run), again)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        tell("gone")


class Server:
    """The parent's end of the fork server."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def start(self, child: Callable[[Path, bool], None], run: Path, again: bool = False) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([child.__name__, str(run), again]) + "\n")
        self.process.stdin.flush()

    def wait_for(self, word: str) -> list[str]:
        """The lines up to the first that starts with the word."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line.strip())
            if line.split()[0] == word:
                return lines
        raise AssertionError(f"the server ended before it said {word!r}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def kill_repeatedly(server: Server, run: Path, *, again: bool, deleting: bool) -> "Counter[str]":
    """Where the kills hit: how many while deleting, and what they left behind."""
    save(run, 5, contents(5), {"mark": 5}, keep_last=2)
    (run / "completed").write_bytes(struct.pack("<q", 5))
    draw, hits = random.Random(again), Counter[str]()
    child = save_with_slow_deletion if deleting else save_for_ever
    wanted = "deleting" if deleting else ".tmp"
    for number in range(4 * KILLS):
        # how many random moments fall inside a save depends on the disk: go on until enough have
        if number >= KILLS // 2 and hits[wanted] > KILLS // 10:
            break
        server.start(child, run, again)
        pid = int(server.wait_for("deleting" if deleting else "ready")[-1].split()[1])
        time.sleep(draw.uniform(0, 0.006 if deleting else 0.03))
        os.kill(pid, signal.SIGKILL)
        hits.update(["deleting"] if "deleted" not in server.wait_for("gone") else [])
        hits.update({path.name.split("-")[0] for path in (run / "checkpoints").iterdir()})
        mark = mark_of(run)
        assert mark - completed(run) in (0, 1)
        (run / "completed").write_bytes(struct.pack("<q", mark))
    return hits


@pytest.mark.parametrize("again", [False, True], ids=["next steps", "same step again"])
def test_a_kill_at_a_random_moment_loses_at_most_the_save_in_progress(
    server: Server, again: bool, tmp_path: Path
) -> None:
    hits = kill_repeatedly(server, tmp_path, again=again, deleting=False)
    assert hits[".tmp"] > KILLS // 10, hits


@pytest.mark.parametrize("again", [False, True], ids=["next steps", "same step again"])
def test_a_kill_while_cleaning_up_loses_nothing(server: Server, again: bool, tmp_path: Path) -> None:
    hits = kill_repeatedly(server, tmp_path, again=again, deleting=True)
    assert hits["deleting"] > KILLS // 10, hits


def test_a_full_disk_is_a_clear_error_and_the_old_checkpoint_is_untouched(server: Server, tmp_path: Path) -> None:
    save(tmp_path, 5, contents(5), {"mark": 5}, keep_last=2)
    server.start(save_under_a_limit, tmp_path)
    text = server.wait_for("error")[-1]
    server.wait_for("gone")
    assert "File too large (errno 27, at " in text
    assert "model.safetensors" in text
    assert "step-5 is untouched and still the latest. Raise the file size limit" in text
    assert mark_of(tmp_path) == 5
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-5"]


if __name__ == "__main__":
    serve()
