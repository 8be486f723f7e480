"""What a run must remember to go on as if it had never stopped: the contents of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from turnout.data.sampler import Sampler
from turnout.train.checkpoint import Checkpoint
from turnout.train.checkpoint_fit import check_fits
from turnout.train.checkpoint_optimizer import optimizer_state, set_optimizer_state
from turnout.train.checkpoint_rng import rng_state, set_rng_state
from turnout.train.checkpoint_tensors import FlatState


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run that change while it trains; `counters` are plain JSON values."""

    model: nn.Module
    optimizer: optim.Optimizer
    sampler: Sampler
    counters: Mapping[str, Any]
    recipe: Mapping[str, Any]  # as data: what the settings were

    def capture(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """(files, meta) for `checkpoint.save`: weights and router state, moments, random generators, data position."""
        moments = optimizer_state(self.optimizer, self.model.named_parameters())
        rng = rng_state()
        files = {"model": self.model.state_dict(), "optimizer": moments.tensors, "rng": rng.tensors}
        meta = {
            "optimizer": moments.meta,
            "rng": rng.meta,
            "sampler": self.sampler.state_dict(),
            "counters": dict(self.counters),
            "recipe": dict(self.recipe),
        }
        return files, meta

    def restore(self, loaded: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Put everything back, bit for bit; returns the counters, and notes on what this machine cannot restore.

        The optimizer's settings stay those it was built with: they are the recipe's, which may have changed.
        Raises: CheckpointError before anything is changed if the checkpoint is of another model or other data.
        """
        check_fits(self.model.state_dict(), loaded.files["model"])
        self.sampler.load_state_dict(loaded.meta["sampler"])
        moments = FlatState(tensors=loaded.files["optimizer"], meta=loaded.meta["optimizer"])
        set_optimizer_state(self.optimizer, self.model.named_parameters(), moments, own_settings=True)
        self.model.load_state_dict(loaded.files["model"])
        notes = set_rng_state(FlatState(tensors=loaded.files["rng"], meta=loaded.meta["rng"]))
        return loaded.meta["counters"], notes
