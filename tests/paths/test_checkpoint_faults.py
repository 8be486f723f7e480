"""A save that fails or dies at any call to the system leaves the older checkpoint loadable, and says what to do."""

import errno
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable
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
from turnout.train.durable import write_file

KINDS = ("single", "sharded")
CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class DeadError(BaseException):
    """The process is gone: neither cleaning up nor anything else can run."""


def save_marked(run: Path, step: int, mark: int, kind: str = "single") -> Path:
    files = {name: {"w": torch.full((4,), float(mark))} for name in ("model", "optimizer")}
    if kind == "single":
        return save(run, step, files, {"mark": mark}, keep_last=2)
    pieces = {part: {name: piece(tensor) for name, tensor in own.items()} for part, own in files.items()}
    return save_pieces(run, step, pieces, {"mark": mark}, keep_last=2, world=World())


def piece(tensor: Tensor) -> Piece:
    return Piece(tensor=tensor, layout=whole_of("model", "w", tuple(tensor.shape)))


def loaded_mark(run: Path) -> int:
    """The mark of what loads; fails unless model, optimizer and meta are of one save."""
    loaded = load(run)
    marks = {float(tensors["w"][i]) for tensors in loaded.files.values() for i in range(4)}
    assert marks == {float(loaded.meta["mark"])}
    return loaded.meta["mark"]


class FaultyDisk:
    """Counts calls to the system, `write` included, and fails from the nth on: once, or for ever when dead."""

    def __init__(self, patch: pytest.MonkeyPatch, nth: int, failure: Callable[[], BaseException]) -> None:
        self.count, self.nth, self.failure = 0, nth, failure
        for name in CALLS:
            patch.setattr(os, name, self.counted(getattr(os, name)))
        plain_open = pathlib.Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = plain_open(path, mode, *args, **kwargs)
            return FaultyFile(file, self) if "x" in mode else file

        patch.setattr(pathlib.Path, "open", opened)

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return call(*args, **kwargs)

        return counting

    def step(self) -> None:
        self.count += 1
        failure = self.failure()
        if self.count == self.nth or (self.count > self.nth and isinstance(failure, DeadError)):
            raise failure


class FaultyFile:
    """A file that, when its disk fails, takes half of what is written to it."""

    def __init__(self, file: Any, disk: FaultyDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.disk.step()
        except BaseException:
            self.file.write(bytes(data)[: len(data) // 2])
            raise
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two_saves")
    save_marked(run, 1, mark=1, kind="sharded")
    save_marked(run, 2, mark=2)
    return run


def check_recovery(run: Path, legal: set[int]) -> None:
    """One of the legal marks loads, and the next save works and clears what was left over."""
    assert loaded_mark(run) in legal
    save_marked(run, 4, mark=4)
    assert loaded_mark(run) == 4
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 2], ids=["next step", "same step again"])
def test_an_error_at_any_call_leaves_the_old_checkpoint_and_the_next_save_works(
    step: int, kind: str, two_saves: Path, tmp_path: Path
) -> None:
    texts = []
    for nth in range(1, 200):
        run = shutil.copytree(two_saves, tmp_path / f"{nth}")
        legal = {2, 3}
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            disk = FaultyDisk(patch, nth, lambda: OSError(errno.ENOSPC, "No space left on device"))
            try:
                save_marked(run, step, mark=3, kind=kind)
                legal = {3}
            except CheckpointError as error:
                texts.append(str(error))
        check_recovery(run, legal)
        if disk.count < nth:
            break
    assert 10 < len(texts) < 50
    told = r"No space left on device \(errno 28, at .*step-[23] is untouched and still the latest\. Free disk space"
    assert all(re.search(told, text) for text in texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 2], ids=["next step", "same step again"])
def test_death_at_any_call_leaves_one_whole_checkpoint(step: int, kind: str, two_saves: Path, tmp_path: Path) -> None:
    died = 0
    for nth in range(1, 200):
        run = shutil.copytree(two_saves, tmp_path / f"{nth}")
        with pytest.MonkeyPatch.context() as patch:
            disk = FaultyDisk(patch, nth, DeadError)
            try:
                save_marked(run, step, mark=3, kind=kind)
            except DeadError:
                died += 1
        check_recovery(run, {2, 3})
        if disk.count < nth:
            break
    assert 20 < died < 60


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files by /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_every_name_appears_only_after_what_it_names_is_on_the_device(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    save_marked(tmp_path, 1, mark=1)
    save_marked(tmp_path, 2, mark=2)
    events: list[tuple[str, str]] = []

    def record(name: str, path: Callable[[Any], str]) -> None:
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (events.append((name, path(args))), call(*args))[1])

    record("fsync", lambda args: Path(os.readlink(f"/proc/self/fd/{args[0]}")).name)
    for name in ("rename", "replace"):
        record(name, lambda args: Path(args[1]).name)
    save_marked(tmp_path, 3, mark=3, kind=kind)
    pid = os.getpid()
    names = ["model", "optimizer"] if kind == "single" else ["model.00000", "optimizer.00000"]
    # each rank flushes the names of its files
    of_ranks = [] if kind == "single" else [("fsync", f".tmp-step-3-{pid}")]
    assert events == [
        *(("fsync", f"{name}.safetensors") for name in names),
        *of_ranks,
        ("fsync", "manifest.json"),
        ("fsync", f".tmp-step-3-{pid}"),
        ("rename", "step-3"),
        ("fsync", folder.name),
        ("fsync", f".tmp-latest-{pid}"),
        ("replace", "latest"),
        ("fsync", folder.name),
        ("rename", f".gone-step-1-{pid}"),
        ("fsync", folder.name),
    ]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"No space left on device \(errno 28, at .*model\.safetensors\).*Free disk space"),
        (errno.EROFS, r"Read-only file system.*mount it writable"),
        (errno.EDQUOT, r"quota"),
        (errno.EIO, r"Check the disk"),
    ],
)
def test_the_error_names_path_cause_what_is_intact_and_the_way_out(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_marked(tmp_path, 1, mark=1)

    def failing(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError, match=f"cannot save .*step-2: .*{advice}") as caught:
            save_marked(tmp_path, 2, mark=2)
    assert "step-1 is untouched and still the latest" in str(caught.value)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-1"]


def test_a_first_save_that_fails_says_that_nothing_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Not a directory.*no earlier checkpoint.*give another run folder"):
        save_marked(tmp_path / "file", 1, mark=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    save_marked(tmp_path, 1, mark=1)
    (tmp_path / "checkpoints").chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*writable"):
            save_marked(tmp_path, 2, mark=2)
        assert loaded_mark(tmp_path) == 1
    finally:
        (tmp_path / "checkpoints").chmod(0o700)


def test_a_short_write_without_an_error_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_fstat = os.fstat

    def shorter(descriptor: int) -> os.stat_result:
        fields = list(plain_fstat(descriptor))
        fields[6] -= 1  # st_size
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", shorter)
    with pytest.raises(OSError, match="short write: 2 of 3 bytes"):
        write_file(tmp_path / "x", [b"abc"])


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    save_marked(tmp_path, 1, mark=1)
    save_marked(tmp_path, 2, mark=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", failing)
        with pytest.warns(UserWarning, match="step-3 is saved, but an older checkpoint could not be deleted"):
            save_marked(tmp_path, 3, mark=3)
    assert loaded_mark(tmp_path) == 3
    save_marked(tmp_path, 4, mark=4)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-3", "step-4"]
