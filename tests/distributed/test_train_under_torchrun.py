"""A run on many ranks is the run of one: the same text, the same losses; and its checkpoints load at any layout."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.cases import worst
from tests.distributed.ranks import join, spawn
from turnout.comm import World
from turnout.config import dump_toml, from_dict
from turnout.data.prepare import DataConfig, Dataset, prepare
from turnout.layers import MoEConfig
from turnout.layers.attention import AttentionConfig
from turnout.losses import LoadBalance
from turnout.models import ModelConfig
from turnout.routers import TopK
from turnout.strategy import Strategy
from turnout.train import checkpoint
from turnout.train.loop import Trainer
from turnout.train.recipe import LoopConfig, Recipe, ScheduleConfig
from turnout.train.signals import StopRequest
from turnout.train.trained import load_trained

Once = Callable[[str, Callable[[Path], None]], Path]
SENTENCE = "a router sends each token to its experts and the experts answer in turn while the rest sleep"
WORDS = SENTENCE.split()
STEPS = 8


def write_text(folder: Path) -> None:
    """Documents of a few words in changing order."""
    folder.mkdir()
    for number in range(20):
        words = [WORDS[(number * 7 + i * (i % 5 + 1)) % len(WORDS)] for i in range(200)]
        (folder / f"document-{number}.txt").write_text(" ".join(words), encoding="utf-8")


def recipe_of(folder: Path, strategy: Strategy) -> Recipe:
    # counted over the step, for one process has the whole batch in one call
    losses = (LoadBalance(scope="global"),)
    moe = MoEConfig(num_experts=4, hidden=16, router=TopK(k=2), losses=losses)
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
    model = ModelConfig(vocab_size=300, dim=16, num_layers=2, max_seq_len=64, attention=attention, moe=moe)
    data = DataConfig(corpus=str(folder / "text"), vocab_size=300, val_fraction=0.2)
    loop = LoopConfig(steps=STEPS, batch_size=4, seq_len=16, eval_every=4, eval_tokens=144, save_every=100, keep_last=9)
    return Recipe(
        name="ranks", model=model, data=data, loop=loop, schedule=ScheduleConfig(warmup=0.2), strategy=strategy
    )


def dataset_of(folder: Path, recipe: Recipe) -> Dataset:
    return prepare(recipe.data, folder / "cache")


def trained(folder: Path, strategy: Strategy, run: Path, world: World, *, resume: bool, until: float) -> Trainer:
    """A run brought to the share `until`, and saved there."""
    recipe = recipe_of(folder, strategy)
    trainer = Trainer(recipe, dataset_of(folder, recipe), run, resume=resume, world=world)
    if resume:
        assert_restored(trainer, run)
    trainer.train(StopRequest(), pause_at=until)
    trainer.save()
    return trainer


def assert_restored(trainer: Trainer, run: Path) -> None:
    """Weights and moments gathered from the ranks are those of the file, bit for bit."""
    loaded = checkpoint.load(run)
    files, meta = trainer._state().capture()
    if trainer.world.rank < trainer.recipe.strategy.ep:
        for name in ("model", "optimizer"):
            assert files[name].keys() == loaded.files[name].keys()
            assert all(torch.equal(files[name][key], value) for key, value in loaded.files[name].items()), name
        assert meta["optimizer"] == loaded.meta["optimizer"]


def four_then_two(world: World, folder: Path) -> None:
    """Half of a run with experts over four ranks, a quarter over two."""
    run = folder / "run"
    trained(folder, Strategy(ep=4), run, world, resume=False, until=0.5)
    dist.destroy_process_group()
    if world.rank < 2:
        join(world.rank, 2, folder)
        here = World(rank=world.rank, size=2, local_size=2)
        trained(folder, Strategy(ep=2, alltoall="rank_dedup"), run, here, resume=True, until=0.75)


def prepared(folder: Path) -> None:
    write_text(folder / "text")
    dataset_of(folder, recipe_of(folder, Strategy()))
    spawn(four_then_two, 4, folder)


@pytest.fixture(scope="session")
def resharded(once: Once) -> Path:
    return once("resharded", prepared)


def test_a_run_goes_on_at_any_layout_and_ends_like_one_process(resharded: Path, tmp_path: Path) -> None:
    last = trained(resharded, Strategy(), resharded / "run", World(), resume=True, until=1.0)
    assert any("random state of 2 ranks" in note for note in last.notes)
    whole = trained(resharded, Strategy(), tmp_path / "run", World(), resume=False, until=1.0)
    for name, value in whole.model.state_dict().items():
        assert worst(last.model.state_dict()[name], value) <= 1e-4, name
    for trainer in (last, whole):
        trainer.finish()
    lines = [losses(resharded / "run"), losses(tmp_path / "run")]
    assert len(lines[0]) == STEPS + 2
    assert worst(torch.tensor(lines[0]), torch.tensor(lines[1])) <= 1e-5


def losses(run: Path) -> list[float]:
    """Training and validation losses in the order they were recorded."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines if line["kind"] in ("step", "eval")]


@pytest.mark.slow
def test_turnout_train_needs_nothing_but_the_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_text(tmp_path / "text")
    settings = ["strategy.ep=2", "loop.steps=4", "loop.eval_every=2", "loop.seq_len=16", "loop.eval_tokens=64"]
    sizes = ["model.vocab_size=300", "data.vocab_size=300", "data.val_fraction=0.2"]
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "turnout", "train", "smoke", "--data", str(tmp_path / "text"), "--out", str(run), "--json"]
    command += [word for each in [*settings, *sizes] for word in ("--set", each)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["steps"] == 4
    assert summary["val_loss"] is not None
    assert "experts over 2 ranks by flat" in done.stderr
    assert (run / "report.html").is_file()
    model = load_trained(run).model
    moe = model.config.moe
    assert moe is not None
    assert all(layer.experts.num_experts == moe.num_experts for _, layer in model.moe_blocks())


def test_ranks_of_one_run_draw_their_own_noise(resharded: Path) -> None:
    """The checkpoint holds a random state for each rank, and no two are alike."""
    states: list[Tensor] = []
    loaded = checkpoint.load(resharded / "run" / "checkpoints" / "step-4")
    for rank in range(4):
        states.append(loaded.files["rng"]["torch_cpu" if rank == 0 else f"rank-{rank}/torch_cpu"])
    assert all(not torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])


def test_the_strategy_of_a_recipe_survives_toml(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, Strategy(ep=4, alltoall="node_dedup"))
    assert from_dict(Recipe, tomllib.loads(dump_toml(recipe))) == recipe
