"""What a run must remember to go on as if it had never stopped: the contents of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from turnout.data.sampler import Sampler
from turnout.parallel import Parallel
from turnout.train.checkpoint import Checkpoint
from turnout.train.checkpoint_fit import check_fits
from turnout.train.checkpoint_optimizer import optimizer_state, set_optimizer_state
from turnout.train.checkpoint_ranks import join_rng_states, rng_state_of
from turnout.train.checkpoint_rng import rng_state, set_rng_state
from turnout.train.checkpoint_tensors import FlatState


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run that change while it trains; `counters` are plain JSON values.

    A checkpoint holds every tensor whole, so it does not depend on the ranks that wrote it.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    sampler: Sampler
    counters: Mapping[str, Any]
    parallel: Parallel
    recipe: Mapping[str, Any]  # as data: what the settings were
    tokenizer: str  # fingerprint of what the token ids mean

    def capture(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """(files, meta) for `checkpoint.save`: weights and router state, moments, random generators, data position.

        Every rank calls it; what the first one gets is to be saved.
        """
        shards = self.parallel.shards
        moments = optimizer_state(self.optimizer, self.model.named_parameters())
        shapes = {name: shards.whole_shape(name, shape) for name, shape in moments.meta["shapes"].items()}
        rng = join_rng_states(self.parallel.world.all(rng_state())[:: self.parallel.repeats])
        files: dict[str, Mapping[str, Tensor]] = {
            "model": shards.whole(self.model.state_dict()),
            "optimizer": shards.whole(moments.tensors),
            "rng": rng.tensors,
        }
        meta = {
            "optimizer": {**moments.meta, "shapes": shapes},
            "rng": rng.meta,
            "sampler": self.sampler.state_dict(),
            "counters": dict(self.counters),
            "recipe": dict(self.recipe),
            "tokenizer": self.tokenizer,
        }
        return files, meta

    def restore(self, loaded: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Put everything back, bit for bit; returns the counters, and notes on what cannot be restored here.

        The optimizer's settings stay those it was built with: they are the recipe's, which may have changed.
        Raises: CheckpointError before anything is changed if the checkpoint is of another model or other data.
        """
        shards = self.parallel.shards
        model = shards.mine(loaded.files["model"])
        check_fits(self.model.state_dict(), model)
        self.sampler.load_state_dict(loaded.meta["sampler"])
        moments = FlatState(tensors=shards.mine(loaded.files["optimizer"]), meta=self._own_shapes(loaded))
        set_optimizer_state(self.optimizer, self.model.named_parameters(), moments, own_settings=True)
        self.model.load_state_dict(model)
        states = FlatState(tensors=loaded.files["rng"], meta=loaded.meta["rng"])
        rng, notes = rng_state_of(states, *self.parallel.random_stream)
        return loaded.meta["counters"], notes + (() if rng is None else set_rng_state(rng))

    def _own_shapes(self, loaded: Checkpoint) -> dict[str, Any]:
        """The optimizer's meta with the shapes of slices where this rank has them."""
        meta = loaded.meta["optimizer"]
        own = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        whole_shape = self.parallel.shards.whole_shape
        shapes = meta.get("shapes", {})
        fitting = {
            name: own[name] if name in own and shape == whole_shape(name, own[name]) else shape
            for name, shape in shapes.items()
        }
        return {**meta, "shapes": fitting} if "shapes" in meta else meta
