"""A run of the training loop that is begun on four ranks, goes on on two, and is ended by one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from turnout.comm import World
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

SENTENCE = "a router sends each token to its experts and the experts answer in turn while the rest sleep"
WORDS = SENTENCE.split()
STEPS = 8
RUN = "run"
# ranks -> how the model lies on them, how they save, and the share of the run after which they do, one part of the run
# after another
BESIDE = {"checkpoint": "sharded", "async_save": True, "save_every": 1}
PARTS: dict[int, list[tuple[Strategy, dict[str, Any], float]]] = {
    4: [
        (Strategy(ep=2, zero=3, alltoall="rank_dedup"), BESIDE, 0.25),
        (Strategy(ep=2, etp=2), {}, 0.375),
        (
            Strategy(tp=2, ep=4, folded=True, sequence_parallel=True, tp_overlap=2, zero=3),
            {"checkpoint": "sharded"},
            0.5,
        ),
    ],
    2: [(Strategy(tp=2), {"checkpoint": "sharded"}, 0.625), (Strategy(etp=2, zero=3), {"checkpoint": "sharded"}, 0.75)],
}


def write_text(folder: Path) -> None:
    """Documents of a few words in changing order."""
    folder.mkdir()
    for number in range(20):
        words = [WORDS[(number * 7 + i * (i % 5 + 1)) % len(WORDS)] for i in range(200)]
        (folder / f"document-{number}.txt").write_text(" ".join(words), encoding="utf-8")


def recipe_of(folder: Path, strategy: Strategy) -> Recipe:
    # counted over the step, for one process has the whole batch in one call
    losses = (LoadBalance(scope="global"),)
    moe = MoEConfig(num_experts=4, hidden=16, router=TopK(k=2), losses=losses, bias=True)
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)
    model = ModelConfig(vocab_size=300, dim=16, num_layers=2, max_seq_len=64, attention=attention, moe=moe)
    data = DataConfig(corpus=str(folder / "text"), vocab_size=300, val_fraction=0.2)
    # compared with one process to 1e-4: never bfloat16, which `auto` chooses on processors that multiply it natively
    loop = LoopConfig(
        steps=STEPS,
        batch_size=4,
        seq_len=16,
        eval_every=3,  # step 3 is one of two groups of ranks that share out the text
        eval_tokens=144,
        save_every=100,
        keep_last=9,
        precision="float32",
        # never asked for in so few steps
        rebalance_every=100 if strategy.expert_copies else 0,
    )
    return Recipe(
        name="ranks", model=model, data=data, loop=loop, schedule=ScheduleConfig(warmup=0.2), strategy=strategy
    )


def dataset_of(folder: Path, recipe: Recipe) -> Dataset:
    return prepare(recipe.data, folder / "cache")


def prepare_text(folder: Path) -> None:
    """What all ranks then find done."""
    write_text(folder / "text")
    dataset_of(folder, recipe_of(folder, Strategy()))


def run_part(world: World, folder: Path) -> None:
    """The parts of the run that so many ranks train."""
    for number, (strategy, saving, until) in enumerate(PARTS[world.size]):
        begins = number == 0 and world.size == max(PARTS)
        trained(folder, strategy, folder / RUN, world, resume=not begins, until=until, **saving).close()


def trained(
    folder: Path, strategy: Strategy, run: Path, world: World, *, resume: bool, until: float, **saving: Any
) -> Trainer:
    """A run brought to the share `until`, and saved there; `saving`: fields of its loop."""
    plain = recipe_of(folder, Strategy())
    recipe = replace(plain, strategy=strategy, loop=replace(plain.loop, **saving))
    trainer = Trainer(recipe, dataset_of(folder, recipe), run, resume=resume, world=world)
    if resume:
        assert_restored(trainer, run)
    trainer.train(StopRequest(), pause_at=until)
    trainer.save()
    return trainer


def assert_restored(trainer: Trainer, run: Path) -> None:
    """Weights and moments gathered from the ranks are those of the file, bit for bit; the rates are the recipe's."""
    loaded = checkpoint.load(run)
    files, meta = trainer._state().capture()
    if trainer.world.is_first:
        for name in ("model", "optimizer"):
            assert files[name].keys() == loaded.files[name].keys()
            assert all(torch.equal(files[name][key], value) for key, value in loaded.files[name].items()), name
        for part in ("kind", "shapes", "scalars"):
            assert meta["optimizer"][part] == loaded.meta["optimizer"][part], part
