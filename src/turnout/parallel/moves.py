"""Experts that change their rank between steps, with what the optimizer keeps of them; nothing is computed with them.

All of an expert that a rank has, weights and moments, goes in one message to its next rank: one uneven all-to-all of a
layer, by the wire that carries rows. What stays is not sent. The bytes are known before, and noted in the ledger.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from turnout.parallel.layout import Parallel
from turnout.parallel.reach import dispatcher_of, moe_layers, prefix_of, sending_own
from turnout.parallel.sites import site_in
from turnout.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Tensors with a row for each expert of this rank: a weight, and what the optimizer keeps of it."""

    weight: nn.Parameter
    state: dict[str, Any]  # the optimizer's own
    names: tuple[str, ...]  # of those in it that have such rows

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight.detach(), *(self.state[name] for name in self.names))

    @property
    def element_bytes(self) -> int:
        """Of one number of the weight, and of those that belong to it."""
        return sum(each.element_size() for each in self.tensors())

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Take these in place of `tensors()`; where the number of rows is the same, where those lie."""
        for name, old, new in zip(("", *self.names), self.tensors(), tensors, strict=True):
            if old.shape == new.shape:
                old.copy_(new)
            elif name:
                self.state[name] = new
            else:
                self.weight.data = new


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


def expert_bytes(layer: MoE, cuts: Mapping[str, Cut], optimizer: Optimizer | None) -> list[int]:
    """What a rank has of one expert, by slice: weights, and what the optimizer keeps of them."""
    slices, kept = next(iter(cuts.values())).slices, _kept(layer, cuts, optimizer)
    return [
        sum(math.prod(cuts[name].part_shape(at)[1:]) * each.element_bytes for name, each in kept.items())
        for at in range(slices)
    ]


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
    kept = {name: _kept(layer, old, optimizer) for name, layer, old in layers}
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


def _kept(layer: MoE, cuts: Mapping[str, Cut], optimizer: Optimizer | None) -> dict[str, Kept]:
    return {name: _kept_of(name, layer.experts.get_parameter(name), optimizer) for name in cuts}


def _kept_of(name: str, weight: nn.Parameter, optimizer: Optimizer | None) -> Kept:
    if weight.grad is not None:
        raise ConfigError(f"{name} has a gradient: experts move between steps; call optimizer.zero_grad() first")
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    rows = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}
    for key, value in rows.items():
        if value.shape != weight.shape:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for {name} of shape "
                f"{list(weight.shape)}: which expert's it is nobody knows; use one whose state is like the weights, "
                "such as AdamW or SGD"
            )
    return Kept(weight=weight, state=state, names=tuple(rows))


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


def _send(
    layer: str,
    kept: Mapping[str, Kept],
    ends: tuple[Placement, Placement],
    parallel: Parallel,
    group: ExpertGroup,
) -> None:
    """One exchange for all that a layer's experts consist of."""
    before, after = ends
    slices, rank = group.num_slices, group.rank
    at = group.place % slices
    mine = before.experts_of(rank)
    leaving = [[e for e in mine if after.rank_of[e] == to != rank] for to in range(before.ranks)]
    coming = [
        [e for e in before.experts_of(source) if after.rank_of[e] == rank != source] for source in range(before.ranks)
    ]
    # slices of an expert are neighbours, and each goes to its own
    places = [(place // slices, place % slices == at) for place in range(group.size)]
    splits = tuple(tuple(len(lists[to]) if is_mine else 0 for to, is_mine in places) for lists in (leaving, coming))
    row = {expert: at for at, expert in enumerate(mine)}
    tensors = [tensor for each in kept.values() for tensor in each.tensors()]
    gone = [row[expert] for experts in leaving for expert in experts]
    route = Route(
        group=group.whole,
        peers=tuple(range(group.size)),
        rank=group.place,
        rows=(splits[0], splits[1]),
        labels=((), ()),
        ledger=parallel.ledger,
        layer=layer or "the layer",
        kind="moves",
    )
    flight = Flight([(_rows(tensor, gone), (splits[0], splits[1])) for tensor in tensors], route, "forward")
    arrived = iter(flight.land())
    staying = [expert for expert in mine if after.rank_of[expert] == rank]
    there = {expert: at for at, expert in enumerate([*staying, *(e for experts in coming for e in experts)])}
    order = [there[expert] for expert in after.experts_of(rank)]
    for each in kept.values():
        stays = [_rows(tensor, [row[expert] for expert in staying]) for tensor in each.tensors()]
        each.put([_rows(torch.cat([old, next(arrived)]), order) for old in stays])


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    return tensor.index_select(0, torch.tensor(list(rows), dtype=torch.int64, device=tensor.device))
