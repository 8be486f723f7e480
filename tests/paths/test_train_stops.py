"""A signal in any phase ends in a checkpoint; NaN is named and not learned from; a full disk does not end a run."""

import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.data.prepare import Dataset
from turnout.errors import CheckpointError, DataError, NonFiniteError
from turnout.train import checkpoint, evaluate, loop
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest


def kill_me(number: int) -> None:
    os.kill(os.getpid(), number)


def kill_on_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int) -> None:
    """The `call`-th call of owner.name first sends this process a signal."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            kill_me(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


PHASES: dict[str, tuple[Any, str, int, int]] = {
    # phase: (owner, function, call at which the signal comes, step at which the run then stands)
    "warm-up": (loop, "train_step", 0, 1),
    "training": (loop, "train_step", 6, 7),
    "evaluation": (evaluate, "validation_batches", 0, 4),
    "saving": (checkpoint, "save", 0, 5),
    "waiting for data": (loop.Sampler, "next_batch", 2, 3),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_leaves_a_checkpoint_of_that_step(
    phase: str,
    number: signal.Signals,
    small_recipe: Recipe,
    small_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, call, step = PHASES[phase]
    with StopRequest() as stop:
        trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
        kill_on_call(monkeypatch, owner, name, call, number)
        assert trainer.train(stop) == "stopped"
        assert stop.received == number
    assert checkpoint.load(tmp_path / "run").step == step == trainer.counters.step


def test_a_signal_before_the_first_step_saves_step_zero(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    with StopRequest() as stop:
        kill_me(signal.SIGTERM)
        trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
        assert trainer.train(stop) == "stopped"
    assert checkpoint.load(tmp_path / "run").step == 0


def test_sigusr1_saves_and_goes_on(small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path) -> None:
    with StopRequest() as stop:
        trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
        seen: list[int] = []

        def signal_at_two(progress: Any) -> None:
            if progress.step == 2:
                kill_me(signal.SIGUSR1)
            if progress.step == 3:
                seen.append(checkpoint.load(tmp_path / "run").step)

        assert trainer.train(stop, on_step=signal_at_two) == "done"
    assert seen == [2]


def poison_weight(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.moe_blocks()[1][1].experts.up_EDG[3, 0, 0] = torch.nan


def poison_gradient(trainer: Trainer) -> None:
    weight = trainer.model.moe_blocks()[0][1].experts.down_EFD
    once = iter([True])
    weight.register_hook(lambda grad: grad * torch.inf if next(once, False) else grad)


POISONS: dict[str, tuple[Callable[[Trainer], None], str]] = {
    "weight": (poison_weight, r"step 1: weight blocks\.1\.ffn\.experts\.up_EDG, expert 3"),
    "gradient": (poison_gradient, r"step 1: gradient blocks\.0\.ffn\.experts\.down_EFD"),
}


@pytest.mark.parametrize("kind", POISONS)
def test_what_is_not_finite_is_named_in_the_same_step(
    kind: str, small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    poison, message = POISONS[kind]
    trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
    poison(trainer)
    with pytest.raises(NonFiniteError, match=message):
        trainer.train(StopRequest())


def test_a_bad_step_can_be_skipped_and_learns_nothing(
    with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer(with_loop(nonfinite="skip"), small_dataset, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    poison_gradient(trainer)
    after: list[dict[str, torch.Tensor]] = []

    def keep(progress: Any) -> None:
        if progress.step == 1:
            after.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    assert trainer.train(StopRequest(), on_step=keep) == "done"
    assert all(torch.equal(before[name], after[0][name]) for name in before)
    trainer.recorder.flush()
    assert "update left out: gradient blocks.0" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_skipping_too_often_stops(with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(with_loop(nonfinite="skip", max_skipped=2), small_dataset, tmp_path / "run")
    trainer.model.norm.weight_D.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonFiniteError, match=r"step 3: gradient norm\.weight_D"):
        trainer.train(StopRequest())


def test_a_full_disk_does_not_end_the_run_and_keeps_the_old_checkpoint(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save

    def full_after_the_first(run: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step > 5:
            raise CheckpointError("cannot save: No space left on device (errno 28)")
        return original(run, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", full_after_the_first)
    trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
    assert trainer.train(StopRequest()) == "done"
    trainer.recorder.flush()
    assert (
        "checkpoint failed, the run goes on: cannot save: No space left" in (tmp_path / "run/metrics.jsonl").read_text()
    )
    assert checkpoint.load(tmp_path / "run").step == 5


def test_a_full_disk_ends_the_run_where_the_policy_says_so(
    with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Path:
        raise CheckpointError("cannot save: No space left on device (errno 28)")

    monkeypatch.setattr(checkpoint, "save", full)
    trainer = Trainer(with_loop(save_failure="stop"), small_dataset, tmp_path / "run")
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.train(StopRequest())


def test_a_validation_loss_that_is_nan_is_told_and_the_run_is_saved(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: math.nan)
    trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
    assert trainer.train(StopRequest()) == "done"
    summary = trainer.finish()
    assert (trainer.unsaved, summary["val_loss"]) == (None, None)
    assert checkpoint.load(tmp_path / "run").step == 12
    assert "the validation loss is nan" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_tokenizer_larger_than_the_model_is_refused(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    from dataclasses import replace

    smaller = replace(
        small_recipe, data=replace(small_recipe.data, vocab_size=280), model=replace(small_recipe.model, vocab_size=280)
    )
    with pytest.raises(DataError, match=re.escape("the tokenizer has 300 tokens, model.vocab_size=280")):
        Trainer(smaller, small_dataset, tmp_path / "run")
