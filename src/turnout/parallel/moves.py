"""Experts that change their rank between steps, with what the optimizer keeps of them; nothing is computed with them.

All of an expert that a rank has, weights and moments, goes in one message to its next rank: one uneven all-to-all of a
layer, by the wire that carries rows. What stays is not sent. The bytes are known before, and noted in the ledger. A
copy is made in the same way, from the nearest rank that holds the expert, and one not wanted any more is let go.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from turnout.balance import expert_moves, moved_bytes
from turnout.comm import ExpertGroup
from turnout.comm.wire import Flight, Route
from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.experts.cut import Cut
from turnout.layers import MoE
from turnout.parallel.copies import rows_of, splits
from turnout.parallel.kept import Kept, expert_bytes, kept_of
from turnout.parallel.layout import Parallel
from turnout.parallel.reach import dispatcher_of, moe_layers, prefix_of, sending_own
from turnout.parallel.sites import site_in
from turnout.placement import Placement


def placements_of(model: nn.Module, parallel: Parallel) -> dict[str, Placement]:
    """Where the experts of each layer lie that ranks share."""
    found = {}
    for name, _ in moe_layers(model):
        cuts = layer_cuts(name, parallel)
        if cuts:
            found[name] = next(iter(cuts.values())).placement
    return found


def layer_cuts(layer: str, parallel: Parallel) -> dict[str, Cut]:
    """How the expert weights of a layer lie, by their own names."""
    prefix = prefix_of(layer)
    every = parallel.shards.of_experts().items()
    return {name.removeprefix(prefix): cut for name, cut in every if name.startswith(prefix)}


def move_bytes(
    model: nn.Module, parallel: Parallel, optimizer: Optimizer | None, placements: Mapping[str, Placement]
) -> dict[str, dict[tuple[int, int], int]]:
    """Layer -> (sender, receiver) -> bytes that `moved` would send, of ranks of the expert group; nothing is sent.

    Raises: ConfigError as `moved` does.
    """
    found = {}
    for name, layer, cuts in _layers(model, parallel, placements):
        before = next(iter(cuts.values())).placement
        found[name] = moved_bytes(before, placements[name], expert_bytes(layer, cuts, optimizer))
    return found


@torch.no_grad()
def moved(
    model: nn.Module, parallel: Parallel, optimizer: Optimizer | None, placements: Mapping[str, Placement]
) -> Parallel:
    """The layout after the experts of some layers, by name, have moved; parameters stay the objects they are.

    Every rank calls it between steps with the same placements. Where a rank gets another number of experts its
    parameters change their shape. What the optimizer keeps of an expert goes with it, bit for bit.
    Raises: ConfigError if a placement is of other experts or ranks, a layer's experts are not shared or lie in shards
    of FSDP, there are gradients, or the optimizer keeps what belongs to no expert.
    """
    cuts = dict(parallel.shards.cuts)
    layers = list(_layers(model, parallel, placements))
    kept = {name: kept_of(layer, old, optimizer) for name, layer, old in layers}
    _check_alike(parallel, kept)
    for name, layer, old in layers:
        group, after = parallel.groups.experts, placements[name]
        assert group is not None
        before = next(iter(old.values())).placement
        if before == after:
            continue
        new = {own: replace(cut, placement=after) for own, cut in old.items()}
        _send(name, kept[name], (before, after), parallel, group)
        assert isinstance(layer.experts, FFNExperts)
        layer.experts.num_experts = len(after.experts_of(group.rank))
        cuts |= {prefix_of(name) + own: cut for own, cut in new.items()}
        reach = dispatcher_of(name, parallel.strategy, group, new, parallel.ledger)
        layer.reach(sending_own(name, reach, parallel.strategy, parallel.groups.tensor, parallel.ledger))
        layer.stand(site_in(group, after))
    return replace(parallel, shards=replace(parallel.shards, cuts=cuts))


def _layers(
    model: nn.Module, parallel: Parallel, placements: Mapping[str, Placement]
) -> Iterator[tuple[str, MoE, dict[str, Cut]]]:
    """The layers that move, checked, in the order of the model."""
    layers = dict(moe_layers(model))
    unknown = sorted(placements.keys() - layers.keys())
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no layer with experts; there are: {', '.join(layers) or 'none'}")
    for name, layer in layers.items():
        if name not in placements:
            continue
        cuts = layer_cuts(name, parallel)
        if not cuts:
            raise ConfigError(f"{name}: every rank has all experts, none can move; nearest legal: strategy.ep=2")
        sharded = [own for own in cuts if prefix_of(name) + own in parallel.shards.shardings]
        if sharded:
            raise ConfigError(
                f"{name}: experts of which groups of ranks have copies lie in shards (strategy.zero=3), and a shard is "
                f"no expert; nearest legal: zero=0, or ep={parallel.world.size}"
            )
        # its errors now, before anything is sent
        list(expert_moves(next(iter(cuts.values())).placement, placements[name]))
        yield name, layer, cuts


def _check_alike(parallel: Parallel, kept: Mapping[str, Mapping[str, Kept]]) -> None:
    """What travels together must be the same on all ranks, or bytes would be taken for others."""
    own = [
        (layer, name, str(each.weight.dtype), [(key, str(each.state[key].dtype)) for key in each.names])
        for layer, weights in kept.items()
        for name, each in weights.items()
    ]
    found = parallel.world.all(own)
    if any(each != found[0] for each in found):
        raise ConfigError(
            "ranks keep different things of their experts: every rank must move the same layers, and have made the "
            "same steps with the same optimizer"
        )


@dataclass(frozen=True, kw_only=True)
class _Errand:
    """What one rank of a mesh sends and gets; experts in its own order before and after."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    leaving: list[list[int]]  # to each rank
    coming: list[list[int]]  # from each rank

    @classmethod
    def of(cls, rank: int, before: Placement, after: Placement) -> "_Errand":
        # both ends of a message take the experts in the order of this list
        moves = list(expert_moves(before, after))
        return cls(
            before=before.experts_of(rank),
            after=after.experts_of(rank),
            leaving=[[e for e, of, to in moves if (of, to) == (rank, there)] for there in range(before.ranks)],
            coming=[[e for e, of, to in moves if (of, to) == (there, rank)] for there in range(before.ranks)],
        )

    def sent(self, tensor: Tensor) -> Tensor:
        """The rows that leave, by their next rank."""
        return rows_of(tensor, [self.before.index(expert) for expert in itertools.chain(*self.leaving)])

    def done(self, tensor: Tensor, arrived: Tensor) -> Tensor:
        """The rows of this rank's experts now."""
        there = [*self.before, *itertools.chain(*self.coming)]
        return rows_of(torch.cat([tensor, arrived]), [there.index(expert) for expert in self.after])


def _send(
    layer: str,
    kept: Mapping[str, Kept],
    ends: tuple[Placement, Placement],
    parallel: Parallel,
    group: ExpertGroup,
) -> None:
    """One exchange for all that a layer's experts consist of."""
    errand = _Errand.of(group.rank, *ends)
    numbers = splits(errand.leaving, group), splits(errand.coming, group)
    route = Route(
        group=group.whole,
        peers=tuple(range(group.size)),
        rank=group.place,
        rows=numbers,
        labels=((), ()),
        ledger=parallel.ledger,
        layer=layer or "the layer",
        kind="moves",
    )
    tensors = [tensor for each in kept.values() for tensor in each.tensors()]
    arrived = iter(Flight([(errand.sent(tensor), numbers) for tensor in tensors], route, "forward").land())
    for each in kept.values():
        each.put([errand.done(tensor, next(arrived)) for tensor in each.tensors()])
