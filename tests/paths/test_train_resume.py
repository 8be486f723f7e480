"""A run that was stopped and resumed is the run that never stopped, bit for bit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.data.prepare import Dataset
from turnout.routers import DeepSeekV3, GShardTop2
from turnout.train import checkpoint, state
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest

CLOCK = {"seconds", "tokens_per_s"}


def train_to_end(recipe: Recipe, dataset: Dataset, run: Path) -> Trainer:
    trainer = Trainer(recipe, dataset, run)
    assert trainer.train(StopRequest()) == "done"
    trainer.finish()
    return trainer


def train_with_a_stop(recipe: Recipe, dataset: Dataset, run: Path, at_step: int) -> Trainer:
    with StopRequest() as stop:
        first = Trainer(recipe, dataset, run)
        outcome = first.train(
            stop, on_step=lambda p: os.kill(os.getpid(), signal.SIGTERM) if p.step == at_step else None
        )
        first.recorder.close()
    assert outcome == "stopped"
    # what the process did in between must not matter
    torch.manual_seed(999)
    second = Trainer(recipe, dataset, run, resume=True)
    assert second.counters.step == at_step
    assert second.train(StopRequest()) == "done"
    second.finish()
    return second


def everything(run: Path) -> dict[str, Any]:
    loaded = checkpoint.load(run)
    tensors = {f"{file}/{name}": t for file, group in loaded.files.items() for name, t in group.items()}
    counters = {k: v for k, v in loaded.meta["counters"].items() if k not in CLOCK}
    return {"tensors": tensors, "sampler": loaded.meta["sampler"], "counters": counters}


def lines(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


# one router draws, so the random generator must be restored as well; the other's bias moves without a gradient
ROUTERS = {"draws": GShardTop2(), "moves its bias": DeepSeekV3(k=2, bias_step=0.01)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("router", ROUTERS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    router: str, seed: int, small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    assert small_recipe.model.moe is not None
    moe = replace(small_recipe.model.moe, router=ROUTERS[router])
    recipe = replace(small_recipe, model=replace(small_recipe.model, moe=moe), seed=seed)
    train_to_end(recipe, small_dataset, tmp_path / "whole")
    train_with_a_stop(recipe, small_dataset, tmp_path / "cut", at_step=3 + seed)
    whole, cut = everything(tmp_path / "whole"), everything(tmp_path / "cut")
    assert whole["tensors"].keys() == cut["tensors"].keys()
    different = [name for name, tensor in whole["tensors"].items() if not torch.equal(tensor, cut["tensors"][name])]
    assert different == []
    assert whole["sampler"] == cut["sampler"]
    assert whole["counters"] == cut["counters"]
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_resume_says_which_random_state_it_could_not_restore(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_to_end(small_recipe, small_dataset, tmp_path / "run")
    monkeypatch.setattr(state, "set_rng_state", lambda _: ("a device is missing",))
    assert "a device is missing" in Trainer(small_recipe, small_dataset, tmp_path / "run", resume=True).notes


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    runs = {name: replace(small_recipe, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))}
    for name, recipe in runs.items():
        train_to_end(recipe, small_dataset, tmp_path / name)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


def test_a_killed_run_resumes_from_its_last_checkpoint_without_duplicate_records(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(progress: Any) -> None:
        if progress.step == 8:
            raise Killed

    trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
    with pytest.raises(Killed):
        trainer.train(StopRequest(), on_step=die)
    trainer.recorder.flush()
    resumed = Trainer(small_recipe, small_dataset, tmp_path / "run", resume=True)
    assert resumed.counters.step == 5
    resumed.train(StopRequest())
    resumed.finish()
    train_to_end(small_recipe, small_dataset, tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
