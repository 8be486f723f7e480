"""The random generators of all ranks in one checkpoint, and each rank's own out of it."""

from collections.abc import Sequence

import torch

from turnout.comm import World
from turnout.train.checkpoint_tensors import FlatState

_RANKS = "ranks"  # meta of the ranks after the first


def join_rng_states(states: Sequence[FlatState]) -> FlatState:
    """One state of all ranks; the first rank's has the names that a run of one process gives it."""
    first, *others = states
    if not others:
        return first
    tensors = dict(first.tensors)
    for rank, state in enumerate(others, start=1):
        tensors |= {f"rank-{rank}/{name}": tensor for name, tensor in state.tensors.items()}
    return FlatState(tensors=tensors, meta={**first.meta, _RANKS: [state.meta for state in others]})


def rng_state_of(joined: FlatState, world: World) -> tuple[FlatState | None, tuple[str, ...]]:
    """This rank's state, None if the checkpoint was written by fewer ranks; and notes where the numbers differ."""
    others = joined.meta.get(_RANKS, [])
    saved = 1 + len(others)
    differs = (
        f"the checkpoint has the random state of {saved} ranks, this run has {world.size}: what routers draw at "
        "random goes on in another way; weights, moments and data are exact"
    )
    notes = () if saved == world.size else (differs,)
    if world.rank >= saved:
        # ranks must not draw alike, and the numbers of a run must not repeat
        torch.manual_seed(int(joined.tensors["torch_cpu"].to(torch.int64).sum()) + world.rank)
        return None, notes
    if world.is_first:
        names = [name for name in joined.tensors if not name.startswith("rank-")]
        meta = {name: value for name, value in joined.meta.items() if name != _RANKS}
        return FlatState(tensors={name: joined.tensors[name] for name in names}, meta=meta), notes
    prefix = f"rank-{world.rank}/"
    tensors = {n.removeprefix(prefix): t for n, t in joined.tensors.items() if n.startswith(prefix)}
    return FlatState(tensors=tensors, meta=others[world.rank - 1]), notes
