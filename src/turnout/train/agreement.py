"""What the ranks of a run settle before its first step: that they were told the same, who writes, where it goes on."""

from pathlib import Path

import torch

from turnout.comm import World
from turnout.config import dump_toml
from turnout.data.prepare import Dataset
from turnout.errors import ConfigError
from turnout.observe.metrics import METRICS_NAME
from turnout.train import checkpoint
from turnout.train.checkpoint import Checkpoint
from turnout.train.checkpoint_sharded import Wanted
from turnout.train.checkpoint_together import load_together
from turnout.train.recipe import Recipe
from turnout.train.run_lock import RunLock


def require_alike(recipe: Recipe, dataset: Dataset, world: World) -> None:
    """Raises: ConfigError on every rank if they were not all given the same recipe and the same text."""
    _require_same("recipe", dump_toml(recipe), world)
    # the folder's name has the fingerprint of text and tokenizer in it
    _require_same("text", dataset.path.name, world)


def _require_same(what: str, mine: str, world: World) -> None:
    all_ = [text.splitlines() for text in world.all(mine)]
    for rank, lines in enumerate(all_):
        if lines != all_[0]:
            differing = next((line for line in lines if line not in all_[0]), "with less in it")
            raise ConfigError(
                f"rank {rank} has another {what} than rank 0 ({differing}); give every rank the same command and files"
            )


def claim(run: Path, world: World, *, resume: bool) -> RunLock | None:
    """The lock on a run's folder, which the first rank holds for all of them; None on the others.

    Raises: ConfigError on every rank if a new run would write over another, another job writes this one, or the folder
    cannot be written.
    """

    def claimed() -> RunLock | None:
        if not world.is_first:
            return None
        if not resume:
            require_free(run)
        try:
            return RunLock(run)
        except OSError as error:
            way_out = "resume a copy of it elsewhere" if resume else "choose another --out"
            raise ConfigError(
                f"the run's folder {run} cannot be written ({error.strerror or error}); {way_out}"
            ) from error

    return world.together(claimed)


def last_checkpoint(run: Path, world: World, device: torch.device, wanted: Wanted) -> Checkpoint:
    """The run's last sound checkpoint, the same one on every rank, and of its tensors what this rank wants.

    Raises: CheckpointError on every rank if one cannot read it.
    """
    return checkpoint.load(run, device) if world.size == 1 else load_together(run, device, world, wanted)


def require_free(run: Path) -> None:
    """Raises: ConfigError if the folder holds what a new run would write over, be it only somebody's recipe."""
    for name in (METRICS_NAME, "recipe.toml"):
        if (run / name).exists():
            raise ConfigError(
                f"{run} already holds a run or its recipe ({name}); go on in it with --resume {run}, or choose "
                "another --out"
            )
