"""Every built-in recipe on several ranks, as it is but for its size: what routers learn from the text before training
is the same wherever it is learned."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import worst
from tests.distributed.ranks import spawn
from tests.distributed.runs import prepare_text
from turnout.comm import World
from turnout.data.prepare import prepare
from turnout.train import checkpoint
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.recipes import RECIPES, load_recipe
from turnout.train.signals import StopRequest

LAYOUTS = {"experts": ["strategy.ep=2"], "stages": ["strategy.pp=2", "loop.batch_size=2", "loop.accumulate=2"]}
SIZES = ("model.vocab_size=300", "data.vocab_size=300", "data.val_fraction=0.2", "loop.batch_size=4")
LOOP = ("loop.seq_len=16", "loop.eval_tokens=64", "loop.steps=3", "loop.save_every=0", 'loop.precision="float32"')
# functions of token ids are drawn before training, by text, and with a table there is something to draw at all
ROUTERS = {
    "as it is": (),
    "hash table": ("model.moe.router={name='hash', vocab_size=300}", "model.moe.losses=[]"),
}
CASES = [(name, "as it is") for name in RECIPES.names()] + [("smoke", "hash table")]


def recipe_of(folder: Path, name: str, routed: str) -> Recipe:
    recipe = load_recipe(name, [*SIZES, *LOOP, *ROUTERS[routed]])
    # counted over the step where it is counted at all: one process has the whole batch in one call
    moe = recipe.model.moe
    if moe is not None:
        losses = tuple(replace(loss, scope="global") for loss in moe.losses)
        recipe = replace(recipe, model=replace(recipe.model, moe=replace(moe, losses=losses)))
    return replace(recipe, data=replace(recipe.data, corpus=str(folder / "text")))


def trained(folder: Path, run: str, name: str, routed: str, settings: list[str], world: World) -> None:
    plain = recipe_of(folder, name, routed)
    chosen = load_recipe(name, [*SIZES, *LOOP, *ROUTERS[routed], *settings])
    recipe = replace(plain, strategy=chosen.strategy, loop=chosen.loop)
    trainer = Trainer(recipe, prepare(recipe.data, folder / "cache"), folder / run, world=world)
    try:
        assert trainer.train(StopRequest()) == "done"
        trainer.save()
    finally:
        trainer.close()


def work(world: World, folder: Path) -> None:
    for number, (name, routed) in enumerate(CASES):
        for layout, settings in LAYOUTS.items():
            if name != "tiny-dense" or layout != "experts":
                trained(folder, f"{number}-{layout}", name, routed, settings, world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    prepare_text(folder)
    spawn(work, 2, folder)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_a_recipe_trains_on_ranks_and_stages_as_in_one_process(number: int, folder: Path) -> None:
    name, routed = CASES[number]
    trained(folder, f"{number}-alone", name, routed, [], World())
    alone = checkpoint.load(folder / f"{number}-alone").files["model"]
    for layout in LAYOUTS:
        if name == "tiny-dense" and layout == "experts":
            continue
        found = checkpoint.load(folder / f"{number}-{layout}").files["model"]
        assert found.keys() == alone.keys()
        for tensor, value in alone.items():
            if value.dtype == torch.int64:
                assert torch.equal(found[tensor], value), (layout, tensor)
            else:
                assert worst(found[tensor], value) <= 1e-4, (layout, tensor)
