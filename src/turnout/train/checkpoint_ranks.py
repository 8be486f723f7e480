"""The random generators of all ranks in one checkpoint, and each rank's own out of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turnout.train.checkpoint_tensors import FlatState

_RANKS = "ranks"  # meta of the ranks after the first


def join_rng_states(states: Sequence[FlatState]) -> FlatState:
    """One state of all ranks that draw for themselves; the first one's has the names that a single process gives it."""
    tensors = [own_rng_tensors(state, rank) for rank, state in enumerate(states)]
    joined = {name: tensor for own in tensors for name, tensor in own.items()}
    return FlatState(tensors=joined, meta=join_rng_meta([state.meta for state in states]))


def own_rng_tensors(state: FlatState, rank: int) -> dict[str, Tensor]:
    """The tensors of one rank's state by the names that they have among those of all."""
    return {f"{_prefix(rank)}{name}": tensor for name, tensor in state.tensors.items()}


def join_rng_meta(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON of all ranks' states in one."""
    first, *others = metas
    return {**first, _RANKS: others} if others else dict(first)


def reads_rng(name: str, rank: int) -> bool:
    """Whether a rank needs this tensor out of those of all; the first rank's are also for ranks that have no own."""
    return name.startswith(_prefix(rank)) if rank and name.startswith("rank-") else not name.startswith("rank-")


def rng_state_of(joined: FlatState, at: int, number: int) -> tuple[FlatState | None, tuple[str, ...]]:
    """The state of `number` that is at that place, None if fewer were saved; and notes where the numbers differ."""
    others = joined.meta.get(_RANKS, [])
    saved = 1 + len(others)
    differs = (
        f"the checkpoint has the random state of {saved} ranks, this run has {number}: what routers draw at "
        "random goes on in another way; weights, moments and data are exact"
    )
    notes = () if saved == number else (differs,)
    if at >= saved:
        # ranks must not draw alike, and the numbers of a run must not repeat
        torch.manual_seed(int(joined.tensors["torch_cpu"].to(torch.int64).sum()) + at)
        return None, notes
    if at == 0:
        names = [name for name in joined.tensors if not name.startswith("rank-")]
        meta = {name: value for name, value in joined.meta.items() if name != _RANKS}
        return FlatState(tensors={name: joined.tensors[name] for name in names}, meta=meta), notes
    prefix = _prefix(at)
    tensors = {n.removeprefix(prefix): t for n, t in joined.tensors.items() if n.startswith(prefix)}
    return FlatState(tensors=tensors, meta=others[at - 1]), notes


def _prefix(rank: int) -> str:
    return f"rank-{rank}/" if rank else ""
