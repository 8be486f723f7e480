"""Saves beside the steps: what they hold, how many there are at a time, and who hears of their failures."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.data.prepare import Dataset
from turnout.errors import CheckpointError
from turnout.train import checkpoint, saving
from turnout.train.host_copy import HostCopy
from turnout.train.loop import Trainer
from turnout.train.progress import Progress
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest

KINDS = ("single", "sharded")
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def plain_run(small_recipe: Recipe, small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose saves hold up its steps."""
    run = tmp_path_factory.mktemp("plain") / "run"
    trainer = Trainer(small_recipe, small_dataset, run)
    trainer.train(StopRequest())
    trainer.finish()
    return run


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> "Gate":
    return Gate(monkeypatch)


class Gate:
    """Holds up the writing of checkpoints, in whatever thread, until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.inside, self.most = threading.Event(), 0, 0
        self.failure: BaseException | None = None
        for module, name in ((checkpoint, "save"), (saving, "save_pieces")):
            patch.setattr(module, name, self.guarded(getattr(module, name)))

    def guarded(self, write: Callable[..., Path]) -> Callable[..., Path]:
        def waiting(*args: Any, **kwargs: Any) -> Path:
            self.inside += 1
            self.most = max(self.most, self.inside)
            try:
                assert self.opened.wait(PATIENCE_S)
                if self.failure is not None:
                    raise self.failure
                return write(*args, **kwargs)
            finally:
                self.inside -= 1

        return waiting


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_saving_keeps_the_same_bits(
    kind: str, beside: bool, plain_run: Path, with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer(with_loop(checkpoint=kind, async_save=beside), small_dataset, tmp_path / "run")
    trainer.train(StopRequest())
    trainer.finish()
    assert steps_of(tmp_path / "run") == steps_of(plain_run) == [5, 10, 12]
    for step in (5, 10, 12):
        got, want = (checkpoint.load(run / "checkpoints" / f"step-{step}") for run in (tmp_path / "run", plain_run))
        assert got.files.keys() == want.files.keys()
        for part, tensors in want.files.items():
            assert got.files[part].keys() == tensors.keys()
            assert all(torch.equal(got.files[part][name], each) for name, each in tensors.items()), (step, part)
        assert all(got.meta[key] == want.meta[key] for key in ("optimizer", "rng", "sampler", "tokenizer"))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_while_one_save_is_written_and_no_more_than_one(
    kind: str,
    gate: Gate,
    plain_run: Path,
    with_loop: Callable[..., Recipe],
    small_dataset: Dataset,
    tmp_path: Path,
) -> None:
    trainer = Trainer(with_loop(checkpoint=kind, async_save=True), small_dataset, tmp_path / "run")

    def open_late(progress: Progress) -> None:
        if progress.step == 9:
            # four steps have changed the weights since
            assert (steps_of(tmp_path / "run") if (tmp_path / "run" / "checkpoints").exists() else []) == []
            assert gate.inside == 1
            gate.opened.set()

    trainer.train(StopRequest(), on_step=open_late)
    trainer.save()
    trainer.close()
    assert gate.most == 1
    for step in (5, 10):
        got, want = (checkpoint.load(run / "checkpoints" / f"step-{step}") for run in (tmp_path / "run", plain_run))
        for part in ("model", "optimizer"):
            assert all(torch.equal(got.files[part][name], each) for name, each in want.files[part].items()), step


def test_a_failure_in_the_background_is_told_and_the_run_goes_on(
    gate: Gate, with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    gate.opened.set()
    gate.failure = CheckpointError("the disk is full")
    news: list[tuple[int, str]] = []
    trainer = Trainer(with_loop(async_save=True), small_dataset, tmp_path / "run")

    def listen(progress: Progress) -> None:
        news.extend((progress.step, text) for text in progress.news)
        if progress.step == 8:
            gate.failure = None

    trainer.train(StopRequest(), on_step=listen)
    # the save after step 5 has failed long before that after step 10
    assert news
    assert 5 < news[0][0] <= 8
    assert news[0][1] == "checkpoint failed, the run goes on: the disk is full"
    trainer.save()
    assert trainer.unsaved is None
    trainer.close()
    assert steps_of(tmp_path / "run") == [10, 12]


def test_a_failure_in_the_background_ends_the_run_where_that_is_the_policy(
    gate: Gate, with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    gate.opened.set()
    gate.failure = CheckpointError("the disk is full")
    trainer = Trainer(with_loop(async_save=True, save_failure="stop"), small_dataset, tmp_path / "run")
    with pytest.raises(CheckpointError, match="the disk is full"):
        trainer.train(StopRequest())
    assert 5 <= trainer.counters.step < 12
    trainer.close()


def test_what_is_no_failure_of_a_disk_is_not_swallowed(
    gate: Gate, with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    gate.opened.set()
    gate.failure = ZeroDivisionError("a bug")
    trainer = Trainer(with_loop(async_save=True), small_dataset, tmp_path / "run")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        trainer.train(StopRequest())
    trainer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_a_step_and_the_end_of_a_run_wait_for_the_save(
    kind: str, gate: Gate, with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer(with_loop(checkpoint=kind, async_save=True), small_dataset, tmp_path / "run")

    def fail(progress: Progress) -> None:
        if progress.step == 6:
            threading.Timer(0.2, gate.opened.set).start()
            raise OSError("something else")

    with pytest.raises(OSError, match="something else"):
        trainer.train(StopRequest(), on_step=fail)
    trainer.close()
    assert checkpoint.load(tmp_path / "run").step == 5
    gate.opened.clear()
    resumed = Trainer(with_loop(checkpoint=kind, async_save=True), small_dataset, tmp_path / "run", resume=True)
    resumed.train(StopRequest(), pause_at=10.5 / 12)
    threading.Timer(0.2, gate.opened.set).start()
    resumed.close()
    assert checkpoint.load(tmp_path / "run").step == 10


def test_a_stop_saves_where_it_stops_after_the_save_that_was_on_its_way(
    gate: Gate, with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer(with_loop(async_save=True), small_dataset, tmp_path / "run")
    stop = StopRequest()

    def ask(progress: Progress) -> None:
        if progress.step == 7:
            threading.Timer(0.2, gate.opened.set).start()
            stop._on_stop(15, None)

    assert trainer.train(stop, on_step=ask) == "stopped"
    assert steps_of(tmp_path / "run") == [5, 7]
    trainer.close()


def test_buffers_of_the_host_are_filled_anew_and_shared_memory_stays_shared() -> None:
    host, source = HostCopy(), torch.arange(6.0).view(2, 3)
    copies = host.take({"a": source, "tied": source, "part": source[:, 1:], "none": source[:, :0]})
    source.zero_()
    assert torch.equal(copies["a"], torch.arange(6.0).view(2, 3))
    assert copies["a"] is copies["tied"]
    assert torch.equal(copies["part"], torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    again = host.take({"a": source, "tied": source.clone(), "part": source.double()})
    assert again["a"].data_ptr() == copies["a"].data_ptr()
    assert again["tied"].data_ptr() != again["a"].data_ptr()
    assert again["part"].dtype == torch.float64
    assert (again["a"] == 0).all()
