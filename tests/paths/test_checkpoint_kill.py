"""kill -9 at random moments: always a loadable checkpoint, never a mixed one, at most the save in progress lost.

The children are forked from one server that has imported torch, so that each kill costs milliseconds.
"""

import multiprocessing
import os
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turnout.errors import CheckpointError
from turnout.train.checkpoint import load, save

KILLS = 100


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


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


def save_for_ever(run: Path, ready: Connection, again: bool) -> None:
    """Resume, then save until killed, writing down each mark once its save has returned."""
    mark = mark_of(run)
    progress = os.open(run / "completed", os.O_WRONLY)
    ready.send_bytes(b"r")
    while True:
        mark += 1
        step = 5 if again else mark
        save(run, step, contents(mark), {"mark": mark}, keep_last=1 if again else 2)
        os.pwrite(progress, struct.pack("<q", mark), 0)


def save_with_slow_deletion(run: Path, ready: Connection, again: bool) -> None:
    """The same with each deletion slowed down and announced, so that kills hit the cleaning up."""
    plain: dict[str, Callable[..., None]] = {name: getattr(os, name) for name in ("unlink", "rmdir")}

    def slowly(name: str) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            time.sleep(0.001)
            plain[name](*args, **kwargs)

        return call

    for name in plain:
        setattr(os, name, slowly(name))
    rmtree = shutil.rmtree

    def announced(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            ready.send_bytes(b"c")
        rmtree(path, ignore_errors=ignore_errors)

    shutil.rmtree = announced  # pyright: ignore[reportAttributeAccessIssue]
    save_for_ever(run, ready, again)


def kill_repeatedly(server: Any, child: Callable[..., None], run: Path, *, again: bool, kills: int) -> Counter[str]:
    """Where the kills hit, by what they left behind."""
    save(run, 5, contents(5), {"mark": 5}, keep_last=2)
    (run / "completed").write_bytes(struct.pack("<q", 5))
    draw, hits = random.Random(again), Counter()
    for _ in range(kills):
        here, there = server.Pipe(duplex=False)
        process = server.Process(target=child, args=(run, there, again), daemon=True)
        process.start()
        assert here.poll(60)
        time.sleep(draw.uniform(0, 0.04) if child is save_for_ever else draw.uniform(0, 0.008))
        process.kill()
        process.join()
        here.close()
        there.close()
        left = {path.name.split("-")[0] for path in (run / "checkpoints").iterdir()}
        hits.update(left & {".tmp", ".gone", ".replaced"} or {"between"})
        assert mark_of(run) - completed(run) in (0, 1)
        (run / "completed").write_bytes(struct.pack("<q", mark_of(run)))
    return hits


@pytest.mark.parametrize("again", [False, True], ids=["next steps", "same step again"])
def test_a_kill_at_a_random_moment_loses_at_most_the_save_in_progress(server: Any, again: bool, tmp_path: Path) -> None:
    hits = kill_repeatedly(server, save_for_ever, tmp_path, again=again, kills=KILLS // 2)
    assert hits[".tmp"] > KILLS // 10, hits


@pytest.mark.parametrize("again", [False, True], ids=["next steps", "same step again"])
def test_a_kill_while_cleaning_up_loses_nothing(server: Any, again: bool, tmp_path: Path) -> None:
    hits = kill_repeatedly(server, save_with_slow_deletion, tmp_path, again=again, kills=KILLS // 2)
    assert hits[".gone"] + hits[".replaced"] > KILLS // 10, hits


def save_under_a_limit(run: Path, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        save(run, 6, contents(6), {"mark": 6}, keep_last=2)
        answer.send("saved")
    except CheckpointError as error:
        answer.send(str(error))


def test_a_full_disk_is_a_clear_error_and_the_old_checkpoint_is_untouched(server: Any, tmp_path: Path) -> None:
    save(tmp_path, 5, contents(5), {"mark": 5}, keep_last=2)
    here, there = server.Pipe(duplex=False)
    process = server.Process(target=save_under_a_limit, args=(tmp_path, there), daemon=True)
    process.start()
    assert here.poll(60)
    text = here.recv()
    process.join()
    assert "File too large (errno 27, at " in text
    assert "model.safetensors" in text
    assert "step-5 is untouched and still the latest. Raise the file size limit" in text
    assert mark_of(tmp_path) == 5
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-5"]
