"""What the ranks of a run settle together: who writes, by which recipe, where it goes on, and when it ends."""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.distributed.cases import LayerCase, build, inputs_of
from tests.distributed.runs import dataset_of, recipe_of
from turnout.comm import World
from turnout.data.prepare import Dataset
from turnout.errors import DataError, TurnoutError
from turnout.layers import MoE
from turnout.strategy import Strategy
from turnout.train import checkpoint, checkpoint_write
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest

STOPPED_AT = 2
SLOWER = 1e-5


def agreements(world: World, folder: Path, share: Callable[[MoE, LayerCase], object]) -> dict[str, Any]:
    """A run of two ranks that is stopped, refused, resumed with other settings, and damaged; by what was tried."""
    run, recipe = folder / "agreed", recipe_of(folder, Strategy(ep=2))
    dataset = dataset_of(folder, recipe)

    def trainer(other: Recipe = recipe, *, data: Dataset = dataset, resume: bool = True) -> Trainer:
        return Trainer(other, data, run, resume=resume, world=world)

    first = trainer(resume=False)
    found: dict[str, Any] = {"a second writer": refusal(trainer), "stopped": stopped(first, world)}
    found["written over"] = refusal(lambda: trainer(resume=False))
    found["another seed"] = refusal(lambda: trainer(replace(recipe, seed=3)))
    slower = replace(recipe, strategy=Strategy(), optimizer=replace(recipe.optimizer, lr=SLOWER))
    found["two recipes"] = refusal(lambda: trainer(slower if world.is_first else recipe))
    odd = dataset if world.is_first else replace(dataset, path=folder / "elsewhere")
    found["two texts"] = refusal(lambda: trainer(data=odd))
    second = trainer(replace(slower, loop=replace(slower.loop, checkpoint="sharded")))
    found["resumed"] = {"step": second.counters.step, "lr": [g["peak_lr"] for g in second.optimizer.param_groups]}
    second.train(StopRequest(), pause_at=3 / recipe.loop.steps)
    found["full disk"] = without_room(second, world)
    saved = second.save()
    second.close()
    if world.is_first:
        assert saved is not None
        damage(saved / "model.00001.safetensors")
    third = trainer(slower)
    third.close()
    found["damaged"] = {"step": third.counters.step, "said": third.notes}
    found["one fails"] = refusal(lambda: world.together(lambda: read(world)))
    found["second derivatives"] = refusal(lambda: differentiate_twice(world, share))
    return found


def stopped(first: Trainer, world: World) -> dict[str, Any]:
    """The last rank gets the signal."""
    with StopRequest() as stop:

        def hang_up(step: int) -> None:
            if step == STOPPED_AT and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        outcome = first.train(stop, on_step=lambda progress: hang_up(progress.step))
    first.close()
    return {"outcome": outcome, "by": first.stopped_by, "step": checkpoint.load(first.run).step}


def without_room(second: Trainer, world: World) -> dict[str, Any]:
    """A save for which the disk of the last rank has no room."""

    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with patch.object(checkpoint_write, "write_pieces", full) if not world.is_first else nullcontext():
        saved = second.save()
    left = sorted(path.name for path in (second.run / "checkpoints").iterdir())
    return {"saved": saved, "said": second.unsaved, "left": left}


def refusal(cause: Callable[[], object]) -> str:
    try:
        cause()
    except TurnoutError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def read(world: World) -> int:
    if world.rank == 1:
        raise DataError("rank 1 has no text")
    return world.rank


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def differentiate_twice(world: World, share: Callable[[MoE, LayerCase], object]) -> None:
    case = LayerCase(ranks=2, ep=2, local=2)
    layer = build(case)
    share(layer, case)
    x_TD = inputs_of(case, world.rank).x_TD.requires_grad_()
    torch.autograd.grad(layer(x_TD).y.sum(), x_TD, create_graph=True)
