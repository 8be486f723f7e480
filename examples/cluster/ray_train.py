"""Turnout on Ray Train: python examples/cluster/ray_train.py tiny runs/mine --workers 8 --set strategy.ep=8.

Ray starts the workers, joins them in a process group and sets the variables that torchrun would. RUN is on a disk that
every worker sees; where it has begun it goes on, also in the workers that Ray starts after a failure.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from turnout.cache import default_cache
from turnout.comm import Watch
from turnout.comm.world import current_world
from turnout.data.prepare import prepare
from turnout.train.loop import Trainer
from turnout.train.recipe import check_ranks
from turnout.train.recipes import load_recipe
from turnout.train.signals import StopRequest


def train_loop(config: dict[str, Any]) -> None:
    """What every worker runs: `recipe`, `run` and `settings` are those of `turnout train`."""
    if torch.cuda.is_available():
        # Ray shows each worker all devices of its node
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = current_world(local_size=int(os.environ["LOCAL_WORLD_SIZE"]))
    run = Path(config["run"])
    # the first one looks, so that all go the same way
    resume = world.first((run / "recipe.toml").exists())
    recipe = load_recipe(str(run / "recipe.toml") if resume else config["recipe"], config["settings"])
    check_ranks(recipe, world.size)
    # one worker of each node reads the text, the others find it done
    if int(os.environ["LOCAL_RANK"]) == 0:
        prepare(recipe.data, default_cache())
    world.barrier()
    trainer = Trainer(recipe, prepare(recipe.data, default_cache()), run, resume=resume, world=world)
    with StopRequest() as stop, Watch(world, trainer.parallel.ledger, print):
        if trainer.train(stop) == "done":
            trainer.finish()
    trainer.close()


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker, and NCCL")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    asked = parser.parse_args()
    TorchTrainer(
        train_loop,
        train_loop_config={"recipe": asked.recipe, "run": str(Path(asked.run).absolute()), "settings": asked.settings},
        scaling_config=ScalingConfig(num_workers=asked.workers, use_gpu=asked.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=5)),
        # the group of CPU tensors too: what ranks settle between steps travels by gloo
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if asked.gpu else "gloo", timeout_s=600),
    ).fit()


if __name__ == "__main__":
    main()
