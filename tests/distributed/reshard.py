"""One state carried through layouts, each of which loads what the last one saved, and saves it in its own pieces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor

from tests.distributed.runs import dataset_of, recipe_of
from turnout.comm import World
from turnout.data.sampler import Sampler
from turnout.models import Decoder
from turnout.parallel import Parallel, apply
from turnout.strategy import Strategy
from turnout.train import checkpoint
from turnout.train.checkpoint_sharded import save_pieces
from turnout.train.checkpoint_together import load_together
from turnout.train.optimizer import build_optimizer
from turnout.train.state import RunState

# on four ranks; whether each saves its own pieces, or the first gathers and writes one file
CHAIN: tuple[tuple[str, Strategy, bool], ...] = (
    ("ep 2", Strategy(ep=2), True),
    ("ep 4", Strategy(ep=4), True),
    ("ep 4, with copies", Strategy(ep=4, expert_copies=4), True),
    ("ep 2, with copies, one file", Strategy(ep=2, expert_copies=2), False),
    ("ep 1", Strategy(), True),
    ("ep 2, two slices", Strategy(ep=2, etp=2), True),
    ("ep 2, two slices, with copies", Strategy(ep=2, etp=2, expert_copies=2), True),
    ("ep 2, sharded fully", Strategy(ep=2, zero=3), True),
    ("ep 4, sharded fully, one file", Strategy(ep=4, zero=3), False),
    ("two slices, sharded fully", Strategy(etp=2, zero=3), True),
    ("ep 1, sharded in pairs", Strategy(zero=3, zero_size=2), True),
    ("ep 1, sharded fully", Strategy(zero=3), True),
    ("ep 2 beside tensor parallel, sharded fully", Strategy(tp=2, ep=2, zero=3), True),
    ("ep 1 beside tensor parallel, sharded fully, one file", Strategy(tp=2, zero=3), False),
    ("ep 1 again", Strategy(), True),
)
RUN = "resharded"


def begin(folder: Path) -> None:
    """What one process saves in one file: weights and moments of every kind, none of them alike."""
    state = _state(folder, World(), Strategy(), seed=1)
    for parameter in state.model.parameters():
        moments = {name: torch.rand_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[parameter] = {"step": torch.tensor(7.0), **moments}
    files, meta = state.capture()
    checkpoint.save(folder / RUN, 0, files, meta, keep_last=99)


def reshard(world: World, folder: Path) -> dict[str, Any]:
    """By layout: what this rank found changed, and how much of the experts it held."""
    first = checkpoint.load(folder / RUN / "checkpoints" / "step-0")
    found: dict[str, Any] = {}
    for number, (name, strategy, in_pieces) in enumerate(CHAIN, start=1):
        state = _state(folder, world, strategy, seed=2 + number)
        loaded = load_together(folder / RUN, "cpu", world, state.wants)
        state.restore(loaded)
        files, meta = state.capture()
        changed = _changed(files, first.files) if state.parallel.shards.has_first else []
        # FSDP lists parameters in another order, which says nothing
        keys = ("kind", "shapes", "scalars")
        changed += [f"optimizer: {key}" for key in keys if meta["optimizer"][key] != first.meta["optimizer"][key]]
        found[name] = {"step": loaded.step, "changed": changed, "held": _held(state.model)}
        if in_pieces:
            pieces, meta = state.capture_pieces()
            save_pieces(folder / RUN, number, pieces, meta, keep_last=99, world=world)
        elif world.is_first:
            checkpoint.save(folder / RUN, number, files, meta, keep_last=99)
        world.barrier()
    return found


def _changed(got: Mapping[str, Mapping[str, Tensor]], want: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    names = [f"{part}/{name}" for part in ("model", "optimizer") for name in got[part].keys() ^ want[part].keys()]
    both = [(f"{part}/{n}", got[part].get(n), t) for part in ("model", "optimizer") for n, t in want[part].items()]
    return names + [n for n, a, b in both if a is not None and not (a.dtype == b.dtype and torch.equal(a, b))]


def _held(model: nn.Module) -> int:
    local = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
    return sum(each.numel() for each in local)


def _state(folder: Path, world: World, strategy: Strategy, seed: int) -> RunState:
    recipe = recipe_of(folder, strategy)
    dataset = dataset_of(folder, recipe)
    torch.manual_seed(seed)
    model = Decoder(recipe.model)
    parallel: Parallel = apply(model, strategy, world=world, timeout_s=60.0)
    optimizer: optim.Optimizer = build_optimizer(model, recipe.optimizer)
    return RunState(
        model=model,
        optimizer=optimizer,
        sampler=Sampler(dataset.train, 1, 16, 0, rank=0, world_size=1),
        counters={},
        parallel=parallel,
        recipe={},
        tokenizer="",
    )
