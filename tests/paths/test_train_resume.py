"""A run that was stopped and resumed is the run that never stopped, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.config import dump_toml, to_dict
from turnout.data.prepare import Dataset
from turnout.errors import ConfigError
from turnout.models import Decoder
from turnout.routers import DeepSeekV3, GShardTop2, Hash
from turnout.routers.hash import HashRouter
from turnout.train import checkpoint, state
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe, recipe_of
from turnout.train.resume import changed_settings
from turnout.train.signals import StopRequest

CLOCK = {"seconds", "tokens_per_s"}


def with_moe(recipe: Recipe, **changes: Any) -> Recipe:
    assert recipe.model.moe is not None
    return replace(recipe, model=replace(recipe.model, moe=replace(recipe.model.moe, **changes)))


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
        first.close()
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


# one router draws, so the random generator must be restored as well; the next one's bias moves without a gradient;
# the last holds what it drew for a text it is not shown again
ROUTERS: dict[str, dict[str, Any]] = {
    "draws": {"router": GShardTop2()},
    "moves its bias": {"router": DeepSeekV3(k=2, bias_step=0.01)},
    "was fitted to the text": {"router": Hash(k=2, scale=2.0), "losses": ()},
}


# the random generator has five seeds; what does not draw has two, the others are left to `make exhaustive`
RESUMED = [
    pytest.param(router, seed, marks=[] if router == "draws" or seed in (0, 3) else pytest.mark.exhaustive)
    for router in ROUTERS
    for seed in range(5)
]


@pytest.mark.parametrize(("router", "seed"), RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(
    router: str, seed: int, small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    recipe = replace(with_moe(small_recipe, **ROUTERS[router]), seed=seed)
    train_to_end(recipe, small_dataset, tmp_path / "whole")
    train_with_a_stop(recipe, small_dataset, tmp_path / "cut", at_step=3 + seed)
    whole, cut = everything(tmp_path / "whole"), everything(tmp_path / "cut")
    assert whole["tensors"].keys() == cut["tensors"].keys()
    different = [name for name, tensor in whole["tensors"].items() if not torch.equal(tensor, cut["tensors"][name])]
    assert different == []
    assert whole["sampler"] == cut["sampler"]
    assert whole["counters"] == cut["counters"]
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_new_run_fits_its_routers_to_its_text_and_a_resumed_run_leaves_them_alone(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_moe(small_recipe, router=Hash(k=2), losses=())
    torch.manual_seed(recipe.seed)
    first_draws = greatest_loads(Decoder(recipe.model), small_dataset)
    kept = greatest_loads(train_to_end(recipe, small_dataset, tmp_path / "run").model, small_dataset)
    assert all(ours <= first for ours, first in zip(kept, first_draws, strict=True))
    assert sum(kept) < sum(first_draws)
    monkeypatch.setattr(HashRouter, "before_training", lambda *_: pytest.fail("a resumed run was shown its text"))
    resumed = Trainer(recipe, small_dataset, tmp_path / "run", resume=True)
    assert greatest_loads(resumed.model, small_dataset) == kept


def greatest_loads(model: Decoder, dataset: Dataset) -> list[int]:
    """Of each MoE layer: how often the text has the ids of its busiest expert."""
    count_V = torch.from_numpy(dataset.train.token_counts())
    loads = []
    for _, layer in model.moe_blocks():
        expert_VK = layer.router(torch.zeros(len(count_V), layer.dim), torch.arange(len(count_V))).assignment.as_topk()[
            0
        ]
        load_E = torch.zeros(layer.config.num_experts, dtype=torch.int64)
        for id_experts_V in expert_VK.T:
            load_E.index_add_(0, id_experts_V, count_V)
        loads.append(int(load_E.max()))
    return loads


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
    trainer.close()
    resumed = Trainer(small_recipe, small_dataset, tmp_path / "run", resume=True)
    assert resumed.counters.step == 5
    resumed.train(StopRequest())
    resumed.finish()
    train_to_end(small_recipe, small_dataset, tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def stopped_at_five(recipe: Recipe, dataset: Dataset, run: Path) -> None:
    trainer = Trainer(recipe, dataset, run)
    trainer.train(StopRequest(), pause_at=5 / recipe.loop.steps)
    trainer.save()
    trainer.close()


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_a_resumed_run_learns_at_the_rate_and_decay_of_its_recipe_now(
    weight_decay: float, small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped_at_five(small_recipe, small_dataset, run)
    slower = replace(small_recipe.optimizer, lr=1e-5, weight_decay=weight_decay)
    edited = replace(small_recipe, optimizer=slower, loop=replace(small_recipe.loop, steps=9))
    (run / "recipe.toml").write_text(dump_toml(edited), encoding="utf-8")
    resumed = Trainer(recipe_of(run), small_dataset, run, resume=True)
    resumed.train(StopRequest())
    resumed.finish()
    assert resumed.counters.step == 9
    groups = resumed.optimizer.param_groups
    assert max(group["weight_decay"] for group in groups) == weight_decay
    recorded = {line["step"]: line["lr"] for line in lines(run) if line["kind"] == "step"}
    assert recorded[9] == groups[0]["lr"] <= 1e-5
    assert recorded[5] > 1e-4
    said = [line["text"] for line in lines(run) if line["kind"] == "event"]
    assert "resumed with optimizer.lr=1e-05 (before: 0.002)" in said
    assert "resumed with loop.steps=9 (before: 12)" in said


def test_what_a_run_resumed_with_is_in_its_folder(small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_at_five(small_recipe, small_dataset, run)
    slower = load_recipe(str(run / "recipe.toml"), ["optimizer.lr=1e-5"])
    Trainer(slower, small_dataset, run, resume=True).close()
    assert recipe_of(run) == slower


FIXED: dict[str, tuple[str, str]] = {
    "model.dim": ("32", "16"),
    "model.moe.router.k": ("3", "2"),
    "data.val_fraction": ("0.1", "0.2"),
    "seed": ("7", "0"),
    "loop.batch_size": ("4", "2"),
    "loop.eval_tokens": ("128", "64"),
}


@pytest.mark.parametrize("field", FIXED)
def test_what_a_run_is_cannot_change_in_its_middle(
    field: str, small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    run, (new, old) = tmp_path / "run", FIXED[field]
    stopped_at_five(small_recipe, small_dataset, run)
    other = load_recipe(str(run / "recipe.toml"), [f"{field}={new}"])
    with pytest.raises(ConfigError, match=rf"^{field}={new} cannot take the place of {old}, with"):
        Trainer(other, small_dataset, run, resume=True)
    assert recipe_of(run) == small_recipe


def test_a_setting_younger_than_the_checkpoint_had_its_default(small_recipe: Recipe) -> None:
    saved = to_dict(small_recipe)
    del saved["loop"]["accumulate"], saved["model"]["norm"]
    assert changed_settings(saved, small_recipe) == ()


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = Trainer(small_recipe, small_dataset, run)
    trainer.train(StopRequest(), pause_at=0.2)
    trainer.close()
    with pytest.raises(ConfigError, match=r"already holds a run .* --resume"):
        Trainer(small_recipe, small_dataset, run)
    again = Trainer(small_recipe, small_dataset, run, resume=True)
    assert "ended before its first checkpoint: it starts again" in again.notes[0]
    again.train(StopRequest())
    again.finish()
    train_to_end(small_recipe, small_dataset, tmp_path / "whole")
    assert lines(run) == lines(tmp_path / "whole")


def test_a_folder_with_only_a_recipe_is_not_written_over(
    small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    mine = tmp_path / "recipe.toml"
    mine.write_text("# my own\n" + dump_toml(small_recipe), encoding="utf-8")
    before = mine.read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run or its recipe \(recipe\.toml\)"):
        Trainer(small_recipe, small_dataset, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
    assert mine.read_bytes() == before


def test_a_run_has_one_writer(small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_at_five(small_recipe, small_dataset, run)
    first = Trainer(small_recipe, small_dataset, run, resume=True)
    with pytest.raises(ConfigError, match=rf"is being written by another process, {os.getpid()}; wait"):
        Trainer(small_recipe, small_dataset, run, resume=True)
    first.close()
    holder = "from pathlib import Path; from turnout.train.run_lock import RunLock; import sys, time\n"
    holder += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", holder, str(run)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    try:
        with pytest.raises(ConfigError, match=rf"is being written by another process, {child.pid}; wait"):
            Trainer(small_recipe, small_dataset, run, resume=True)
    finally:
        child.kill()
        child.wait()
    Trainer(small_recipe, small_dataset, run, resume=True).close()


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_learns_what_the_run_learns(with_loop, small_dataset: Dataset, tmp_path: Path) -> None:
    plain, compiled = (
        train_to_end(with_loop(steps=4, compile=compile), small_dataset, tmp_path / str(compile))
        for compile in (False, True)
    )
    for name, weight in plain.model.state_dict().items():
        assert torch.allclose(compiled.model.state_dict()[name], weight, atol=1e-5), name
    assert checkpoint.load(tmp_path / "True").files["model"].keys() == plain.model.state_dict().keys()
