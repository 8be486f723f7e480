"""Experts that move while a model trains: what is routed is counted, and every so many steps a better place looked for.

A move is made where it saves more, over the steps until the next question, than it takes. Every rank knows what all of
them routed, each looks for the placements of some layers, and what one finds is everybody's: all decide alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from turnout.balance import (
    ExpertShape,
    Limits,
    Machine,
    Move,
    Prices,
    Routed,
    balanced,
    best_copied,
    by_rank,
    cost_of,
    pays,
)
from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.layers import MoE
from turnout.parallel.kept import expert_bytes
from turnout.parallel.layout import Parallel
from turnout.parallel.moves import layer_cuts, move_bytes, moved, placements_of
from turnout.parallel.reach import moe_layers
from turnout.parallel.sites import remarks_of, site_in
from turnout.placement import Placement
from turnout.tensors import MoEStats
from turnout.topology import Link


@dataclass(frozen=True, kw_only=True)
class Rebalancing:
    """When experts may move, and what is counted with."""

    every: int  # steps between questions
    spare: int = 0  # experts a rank may hold beyond its even share; with strategy.expert_copies none
    element_bytes: int  # of a number of a row on the wire
    machine: Machine  # its rates
    is_measured: bool = False  # they were measured now: a run that goes on keeps those it began with


class Rebalancer:
    """Counts what this rank routes, and moves experts when it pays."""

    def __init__(self, model: nn.Module, parallel: Parallel, config: Rebalancing) -> None:
        """Raises: ConfigError if no layer has experts that ranks share, or they cannot move."""
        if parallel.groups.experts is None:
            raise ConfigError(
                "every rank has all experts: none can move; nearest legal: strategy.ep=2, or no rebalancing"
            )
        self._config = config
        present = placements_of(model, parallel)
        # refuses what cannot move, before anything is trained
        move_bytes(model, parallel, None, present)
        self._names = list(present)
        self._counts: list[Tensor] = []
        self._tokens: Tensor | None = None
        self._steps = 0

    def note(self, stats: Sequence[MoEStats]) -> None:
        """What this rank routed in a step, over its micro-batches; one entry for each layer. No copy to the host."""
        sent = [each.assigned_E - each.dropped_capacity_E - each.dropped_policy_E for each in stats]
        tokens = stats[0].num_routed.clone()
        self._counts = [a + b for a, b in zip(self._counts, sent, strict=True)] if self._counts else sent
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        self._steps += 1

    def is_due(self, step: int) -> bool:
        """Whether it is to be asked after that step."""
        return self._steps > 0 and step % self._config.every == 0

    def rebalanced(
        self, model: nn.Module, parallel: Parallel, optimizer: Optimizer
    ) -> tuple[Parallel, list[Move], list[list[list[float]]]]:
        """The layout of the next steps, the moves that were made, and what was routed since the last question: of each
        layer the rows of a step from each rank of the expert group to each expert.

        Every rank calls it, between steps.
        """
        routed, tokens = self._routed(parallel)
        self._counts, self._tokens, self._steps = [], None, 0
        layers, found = dict(moe_layers(model)), dict[str, Placement]()
        present = placements_of(model, parallel)
        prices = {name: self._prices(layers[name], name, parallel, optimizer) for name in self._names}
        for number, name in enumerate(self._names):
            # each rank looks for some, all of them for all
            if number % parallel.world.size == parallel.world.rank:
                found[name] = self._looked_for(layers[name], routed[name], prices[name], present[name], parallel)
        for own in parallel.world.all(found):
            found |= own
        changed = {name: found[name] for name in self._names if found[name] != present[name]}
        pairs = move_bytes(model, parallel, optimizer, changed)
        moves = [
            self._move(name, (present[name], to), routed[name], prices[name], pairs[name], parallel, tokens)
            for name, to in changed.items()
        ]
        if changed:
            parallel = moved(model, parallel, optimizer, changed)
        return parallel, moves, [each.rows_RE.round(3).tolist() for each in routed.values()]

    def state(self, parallel: Parallel, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON; every rank calls it."""
        counts = [each.tolist() for each in self._counts]
        tokens = 0 if self._tokens is None else int(self._tokens)
        return {
            "placements": {name: [list(p.bounds), list(p.order)] for name, p in placements_of(model, parallel).items()},
            "ranks": parallel.world.all([counts, tokens]),
            "steps": self._steps,
            "measured": asdict(self._config.machine) if self._config.is_measured else None,
        }

    def restore(self, state: Mapping[str, Any] | None, model: nn.Module, parallel: Parallel) -> dict[str, Placement]:
        """Take up what `state` gave; returns where experts lay, for `moved`. Of another layout nothing is taken up."""
        if state is None:
            return {}
        present = placements_of(model, parallel)
        placements = {
            name: Placement(tuple(bounds), tuple(order)) for name, (bounds, order) in state["placements"].items()
        }
        copies = parallel.strategy.expert_copies
        alike = [
            name in placements
            and (p.num_experts, p.ranks) == (placements[name].num_experts, placements[name].ranks)
            and placements[name].num_slots <= p.num_experts + copies
            for name, p in present.items()
        ]
        if len(state["ranks"]) != parallel.world.size or len(placements) != len(present) or not all(alike):
            return {}
        counts, tokens = state["ranks"][parallel.world.rank]
        device = next(model.parameters()).device
        self._counts = [torch.tensor(each, dtype=torch.int64, device=device) for each in counts]
        self._steps = state["steps"]
        self._tokens = torch.tensor(tokens, device=device) if self._steps else None
        if self._config.is_measured and state["measured"]:
            # measured again it would be another, and decide otherwise than in the run that never stopped
            intra, inter = (Link(**state["measured"][tier]) for tier in ("intra", "inter"))
            machine = Machine(**(state["measured"] | {"intra": intra, "inter": inter}))
            self._config = replace(self._config, machine=machine)
        return placements

    def _routed(self, parallel: Parallel) -> tuple[dict[str, Routed], float]:
        """By layer, a step's rows in a mean expert group; and its tokens."""
        group, world, strategy = parallel.groups.experts, parallel.world, parallel.strategy
        assert group is not None
        assert self._tokens is not None
        own = torch.cat([*self._counts, self._tokens.reshape(1)]).tolist()
        rows_RX = np.zeros((group.mesh.size, len(own)))
        for rank, counts in world.all((group.rank, own)):
            rows_RX[rank] += counts
        # slices of an expert are given the rows of all of them; of ranks with the same tokens each sends a share
        groups = world.size / (group.mesh.size * group.num_slices)
        repeats = parallel.repeats if strategy.tokens_sharded else 1
        rows_RX /= self._steps * groups * repeats
        cuts = np.cumsum([len(each) for each in self._counts])[:-1]
        parts = np.split(rows_RX[:, :-1], cuts, axis=1)
        routed = {name: Routed(rows_RE=part, mesh=group.mesh) for name, part in zip(self._names, parts, strict=True)}
        return routed, float(rows_RX[:, -1].sum())

    def _prices(self, layer: MoE, name: str, parallel: Parallel, optimizer: Optimizer) -> Prices:
        experts, cuts = layer.experts, layer_cuts(name, parallel)
        assert isinstance(experts, FFNExperts)
        slices = next(iter(cuts.values())).slices
        shape = ExpertShape(
            dim=experts.dim,
            # a slice computes with its share of the width, and sends the rows of its own tokens
            hidden=layer.config.hidden // slices,
            gated=experts.activation.gated,
            element_bytes=self._config.element_bytes / slices,
        )
        held = max(expert_bytes(layer, cuts, optimizer))
        # gradients are like the weights
        summed = max(expert_bytes(layer, cuts, None))
        return shape.prices(self._config.machine, expert_bytes=held, gradient_bytes=summed, period=self._config.every)

    def _looked_for(
        self, layer: MoE, routed: Routed, prices: Prices, present: Placement, parallel: Parallel
    ) -> Placement:
        """A placement that costs less, or the present one."""
        group, strategy = parallel.groups.experts, parallel.strategy
        assert group is not None
        # tokens that stay do so wherever experts lie
        if strategy.expert_parts == 0 or not routed.loads_E.sum():
            return present

        def keeps(found: Placement) -> bool:
            # groups of experts that stand for ranks or nodes are not torn apart
            return set(remarks_of(layer, site_in(group, found))) <= set(remarks_of(layer, site_in(group, present)))

        if strategy.expert_copies:
            groups = getattr(layer.config.router, "groups", 1)
            found = best_copied(routed, prices, present, copies=strategy.expert_copies, groups=groups, allowed=keeps)
        else:
            room = -(-routed.num_experts // strategy.ep) + self._config.spare
            found = balanced(routed, prices, present, Limits(room=room))
        now, then = (cost_of(each, routed, prices, present=present) for each in (present, found))
        return found if keeps(found) and pays(now, then, prices) else present

    def _move(
        self,
        name: str,
        ends: tuple[Placement, Placement],
        routed: Routed,
        prices: Prices,
        pairs: Mapping[tuple[int, int], int],
        parallel: Parallel,
        tokens: float,
    ) -> Move:
        group = parallel.groups.experts
        assert group is not None
        sent = by_rank(pairs, group.whole_mesh)
        costs = [cost_of(each, routed, prices, present=ends[0]) for each in ends]
        return Move(
            layer=name or "the layer",
            before=ends[0],
            after=ends[1],
            cost=(costs[0], costs[1]),
            inter_bytes=round(sum(each.inter_bytes for each in sent)),
            intra_bytes=round(sum(each.intra_bytes for each in sent)),
            # costs are of one slice of the experts' rows
            tokens=tokens / group.num_slices,
            period=self._config.every,
        )
