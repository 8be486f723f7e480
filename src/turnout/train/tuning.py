"""Steps for the sake of their time: a recipe's model on random tokens until nothing is left to try."""

import math
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from turnout.comm import World
from turnout.comm.processes import as_rank, start_ranks
from turnout.config import dump_toml, from_dict
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.models import Decoder
from turnout.parallel import Parallel, apply
from turnout.parallel.tuner import Tuner, dictionary_for
from turnout.train.device import autocast_for, compute_dtype, pick_device
from turnout.train.recipe import Recipe, check_ranks, sequences_per_rank
from turnout.train.step import train_step
from turnout.train.tuned import with_strategy
from turnout.tune import Dictionary

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured."""

    loads: tuple[int, ...] = (1,)  # times the recipe's batch, one after another: keys differ by the rows of an expert
    most_steps: int = 200  # of each load

    def __post_init__(self) -> None:
        if not self.loads or min(self.loads) < 1 or self.most_steps < 1:
            raise ConfigError(f"loads={self.loads} and steps={self.most_steps} must be at least 1; nearest legal: 1")


def tune(recipe: Recipe, world: World, plan: Plan, known: str, name: str, say: Say) -> Dictionary:
    """The dictionary with what the steps of a recipe taught; every rank calls it.

    `known`: the text of the file `name` that it goes on from; empty: there is none.
    Raises: ConfigError if there is nothing to tune.
    """
    recipe = _laid_out(recipe, world)
    device = pick_device(recipe.loop.device)
    torch.manual_seed(recipe.seed)
    model = Decoder(recipe.model).to(device)
    cuda = device.type == "cuda"
    parallel = apply(model, recipe.strategy, world=world, timeout_s=recipe.loop.timeout_s, cuda=cuda)
    element_bytes = compute_dtype(device, recipe).itemsize
    tuner = Tuner(model, parallel, dictionary_for(parallel, device, known, name), element_bytes=element_bytes)
    for load in plan.loads:
        parallel = _until_warm(recipe, load, plan.most_steps, model, parallel, tuner, say)
    return tuner.dictionary


def tune_here(recipe: Recipe, ranks: int, plan: Plan, known: str, name: str) -> Dictionary:
    """`tune` on so many gloo processes of this machine.

    Raises: ConfigError if the recipe cannot run on so many ranks, or there is nothing to tune.
    """
    if ranks < 2:
        raise ConfigError(f"ranks={ranks} must be at least 2: one process sends nothing, and has nothing to choose")
    world = World(size=ranks, local_size=ranks)
    _laid_out(recipe, world)
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, ranks, dump_toml(recipe), ranks, folder, (plan, known, name))
        text = (Path(folder) / "found.json").read_text(encoding="utf-8")
    return Dictionary.from_json(text, name)


def _laid_out(recipe: Recipe, world: World) -> Recipe:
    """The recipe with a layout for these ranks: its own, or what the tuner would begin with."""
    recipe = with_strategy(replace(recipe, loop=replace(recipe.loop, tune=recipe.loop.tune or "auto")), world)
    check_ranks(recipe, world.size)
    if recipe.strategy.ep == recipe.strategy.etp == 1:
        raise ConfigError(
            f"{recipe.name} on {world.size} ranks shares no experts: there is nothing to tune; give the model experts "
            "whose number has a divisor in common with the ranks, or set strategy.ep"
        )
    return recipe


def _until_warm(
    recipe: Recipe, load: int, most_steps: int, model: Decoder, parallel: Parallel, tuner: Tuner, say: Say
) -> Parallel:
    device = next(model.parameters()).device
    autocast = autocast_for(device, compute_dtype(device, recipe))
    # the step changes nothing: what is measured is one and the same
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = _batches(recipe, load, parallel.world, device)
    for _ in range(most_steps):
        parallel = tuner.before_step(model, parallel)
        began_s = time.perf_counter()
        result = train_step(
            model, model.loss, optimizer, batches, max_norm=math.inf, autocast=autocast, parallel=parallel
        )
        decided = tuner.after_step(time.perf_counter() - began_s, result.stats, len(batches))
        if decided:
            say(decided)
        if tuner.is_warm:
            break
    else:
        say(f"{most_steps} steps were not enough to try everything")
    return parallel


def _batches(recipe: Recipe, load: int, world: World, device: torch.device) -> Sequence[Batch]:
    """Random tokens, this rank's share of each micro-batch."""
    g = torch.Generator().manual_seed(1 + world.rank)
    shape = (load * sequences_per_rank(recipe, world.size), recipe.loop.seq_len + 1)
    drawn = [torch.randint(recipe.model.vocab_size, shape, generator=g) for _ in range(recipe.loop.accumulate)]
    made = [Batch(tokens_BS=each[:, :-1].contiguous(), targets_BS=each[:, 1:].contiguous()) for each in drawn]
    return [batch.to(device) for batch in made]


def _rank(rank: int, text: str, ranks: int, folder: str, asked: tuple[Plan, str, str]) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    recipe, (plan, known, source) = from_dict(Recipe, tomllib.loads(text)), asked
    recipe = replace(recipe, loop=replace(recipe.loop, device="cpu"))
    with as_rank(rank, ranks, folder, timeout_s=recipe.loop.timeout_s) as world:
        found = tune(recipe, world, plan, known, source, lambda _: None)
        if world.is_first:
            (Path(folder) / "found.json").write_text(found.to_json(), encoding="utf-8")
