"""What a run must remember to go on as if it had never stopped: the contents of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from turnout.data.sampler import Sampler
from turnout.parallel import Layout, Parallel, of_stages
from turnout.parallel.fully_sharded import here
from turnout.parallel.rebalancer import Rebalancer
from turnout.train.checkpoint import Checkpoint
from turnout.train.checkpoint_fit import check_fits
from turnout.train.checkpoint_optimizer import join_optimizer_meta, optimizer_state, set_optimizer_state
from turnout.train.checkpoint_pieces import Piece
from turnout.train.checkpoint_ranks import join_rng_meta, join_rng_states, own_rng_tensors, reads_rng, rng_state_of
from turnout.train.checkpoint_rng import rng_state, set_rng_state
from turnout.train.checkpoint_sharded import whole_of
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
    rebalancer: Rebalancer | None = None  # of a run whose experts move

    def capture(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """(files, meta) for `checkpoint.save`: weights and router state, moments, random generators, data position.

        Every rank calls it; what the first one gets is to be saved.
        """
        parallel = self.parallel
        moments = optimizer_state(self.optimizer, self.model.named_parameters())
        rng = join_rng_states(parallel.world.all(rng_state())[:: parallel.repeats])
        files: dict[str, Mapping[str, Tensor]] = {
            "model": parallel.whole(self.model.state_dict()),
            "optimizer": parallel.whole(moments.tensors),
            "rng": rng.tensors,
        }
        return files, self._meta(moments.meta, rng.meta)

    def capture_pieces(self) -> tuple[dict[str, dict[str, Piece]], dict[str, Any]]:
        """The same for `save_pieces`: what lies on this rank, and nothing is gathered but who draws how."""
        world = self.parallel.world
        moments = optimizer_state(self.optimizer, self.model.named_parameters())
        rng = rng_state()
        parts = {
            "model": self.model.state_dict(),
            "optimizer": moments.tensors,
            # of ranks that draw alike any one writes it
            "rng": own_rng_tensors(rng, self.parallel.random_stream[0]),
        }
        pieces = {part: {name: self._piece(name, each) for name, each in own.items()} for part, own in parts.items()}
        return pieces, self._meta(moments.meta, join_rng_meta(world.all(rng.meta)[:: self.parallel.repeats]))

    def wants(self, part: str, name: str, whole: tuple[int, ...]) -> Layout | None:
        """What of a stored tensor this rank restores."""
        if part == "rng":
            return whole_of(part, name, whole) if reads_rng(name, self.parallel.random_stream[0]) else None
        shards = self.parallel.shards
        return shards.layout(name, whole) if shards.is_here(name) else None

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        shards = self.parallel.shards
        return Piece(tensor=here(tensor).detach(), layout=shards.layout(name, shards.whole_of(name, tensor)))

    def _meta(self, optimizer: Mapping[str, Any], rng: Mapping[str, Any]) -> dict[str, Any]:
        whole_shape = self.parallel.shards.whole_shape
        shapes = {name: whole_shape(name, shape) for name, shape in optimizer["shapes"].items()}
        of_all = of_stages({**optimizer, "shapes": shapes}, self.parallel.groups.stages)
        rebalancer = self.rebalancer
        placement = {} if rebalancer is None else {"placement": rebalancer.state(self.parallel, self.model)}
        return placement | {
            "optimizer": join_optimizer_meta(of_all),
            "rng": dict(rng),
            "sampler": self.sampler.state_dict(),
            "counters": dict(self.counters),
            "recipe": dict(self.recipe),
            "tokenizer": self.tokenizer,
        }

    def restore(self, loaded: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Put everything back, bit for bit; returns the counters, and notes on what cannot be restored here.

        loaded: of every tensor what `wants` says of this rank; a process alone wants all of it.

        The optimizer's settings stay those it was built with: they are the recipe's, which may have changed.
        Raises: CheckpointError before anything is changed if the checkpoint is of another model or other data.
        """
        model = loaded.files["model"]
        check_fits(self.model.state_dict(), model)
        self.sampler.load_state_dict(loaded.meta["sampler"])
        moments = FlatState(tensors=loaded.files["optimizer"], meta=self._own_shapes(loaded))
        set_optimizer_state(self.optimizer, self.model.named_parameters(), moments, own_settings=True)
        self.model.load_state_dict(model)
        states = FlatState(tensors=loaded.files["rng"], meta=loaded.meta["rng"])
        rng, notes = rng_state_of(states, *self.parallel.random_stream)
        return loaded.meta["counters"], notes + (() if rng is None else set_rng_state(rng))

    def _own_shapes(self, loaded: Checkpoint) -> dict[str, Any]:
        """The optimizer's meta with the shapes of slices where this rank has them, and of nothing it has not."""
        meta = loaded.meta["optimizer"]
        own = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        whole_shape = self.parallel.shards.whole_shape
        shapes = meta.get("shapes", {})
        fitting = {
            name: own[name] if name in own and shape == whole_shape(name, own[name]) else shape
            for name, shape in shapes.items()
            if self.parallel.shards.is_here(name)
        }
        return {**meta, "shapes": fitting} if "shapes" in meta else meta
