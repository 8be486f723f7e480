"""A run whose r, chunks and program are chosen step by step: where it begins, and the file it learns into."""

from dataclasses import replace
from pathlib import Path

import torch

from turnout.comm import World
from turnout.models import Decoder
from turnout.parallel import Parallel
from turnout.parallel.auto import auto_strategy
from turnout.parallel.tuner import Tuner, dictionary_for
from turnout.strategy import Strategy
from turnout.train.device import compute_dtype
from turnout.train.durable import make_folder, replace_text
from turnout.train.recipe import Recipe
from turnout.tune import Dictionary

FILE = "strategies.json"  # in a run's folder


def with_strategy(recipe: Recipe, world: World) -> Recipe:
    """The recipe with a layout for these ranks, where it leaves that to the tuner: `loop.tune`, and no strategy."""
    moe = recipe.model.moe
    leaves_it = recipe.loop.tune and recipe.strategy == Strategy()
    if world.size == 1 or not leaves_it or moe is None or not recipe.model.moe_layers():
        return recipe
    return replace(recipe, strategy=auto_strategy(moe.num_experts, moe.hidden, world))


def dictionary_path(recipe: Recipe, run: Path) -> Path:
    """The file that a run reads and writes."""
    return run / FILE if recipe.loop.tune == "auto" else Path(recipe.loop.tune)


def open_tuner(recipe: Recipe, model: Decoder, parallel: Parallel, run: Path, device: torch.device) -> Tuner | None:
    """The tuner of a run; None where the recipe wants none, or no rank has experts of another.

    Every rank calls it.
    Raises: ConfigError if the file is not a dictionary.
    """
    if not recipe.loop.tune or parallel.groups.experts is None:
        return None
    path, world = dictionary_path(recipe, run), parallel.world
    known = world.together(lambda: path.read_text(encoding="utf-8") if world.is_first and path.exists() else "")
    element_bytes = compute_dtype(device, recipe).itemsize
    return Tuner(model, parallel, dictionary_for(parallel, device, known, str(path)), element_bytes=element_bytes)


def save_dictionary(dictionary: Dictionary, path: Path) -> None:
    """Called by the first rank."""
    make_folder(path.parent)
    replace_text(path, dictionary.to_json())
