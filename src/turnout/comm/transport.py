"""The transport that moves rows between processes: an interpreter of the all-to-all programs on torch.distributed.

Local verbs compose indices and move nothing; an exchange gathers its rows once and begins to send them, and whoever
wants them next waits. Each step has its transpose, so a program played backwards is the combine, and autograd plays
either as the gradient of the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turnout.alltoall import Axis, Block, Finer, Leg, Merged, Packing, Program, Transport, itinerary
from turnout.comm.groups import ExpertGroup
from turnout.comm.ledger import Ledger
from turnout.comm.parcels import Labels, Parcels, Sent
from turnout.comm.picks import Picks, placed, runs, spread, starts
from turnout.comm.sizes import Sizes
from turnout.comm.wire import Route, SentLabelled, SentRows, Splits, send_labelled, send_rows
from turnout.errors import ConfigError

Blocks = tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """Rows at their experts, expert by expert and in each in order of (source rank, position at the source)."""

    x_MD: Tensor
    counts: tuple[int, ...]  # rows of each expert of this rank
    parcels: Parcels  # what the way back needs


class TorchTransport(Transport[Parcels]):
    """One layer's transport. Its verbs are called in the order of its program, and in the reverse one on the way back.

    Tensor-parallel groups of more than one rank are not in this version: `tensor` is 1.
    """

    def __init__(self, program: Program, group: ExpertGroup, ledger: Ledger, layer: str) -> None:
        """Raises: ConfigError if the program does not deliver."""
        self.mesh, self.layer = group.mesh, layer
        self._group, self._ledger = group, ledger
        self._legs = itinerary(program, group.mesh, group.rank)

    def load(
        self, x_ND: Tensor, sizes: Sizes, *, picks: Picks | None = None, weight_M: Tensor | None = None
    ) -> Parcels:
        """Rows before the program, ordered by expert; `picks`: the tokens they come from, `weight_M`: their weights."""
        mine = tuple((self._group.rank, to) for to in range(self.mesh.size))
        return Parcels(x_ND=x_ND, sizes=sizes, blocks=mine, picks=picks, weight_M=weight_M)

    def arrive(self, parcels: Parcels) -> Arrived:
        """The rows after the program, regrouped by expert."""
        parcels = parcels.landed()
        experts = parcels.sizes.placement.slots_of(self._group.rank)
        begin: dict[tuple[int, int], int] = {}
        for (source, _), start in zip(parcels.blocks, starts(parcels.row_sizes()), strict=True):
            for expert in experts:
                begin[source, expert] = start
                start += parcels.sizes.experts[source][expert]
        order = [(source, expert) for expert in experts for source in range(self.mesh.size)]
        lengths = [parcels.sizes.experts[source][expert] for source, expert in order]
        index_M = runs([begin[each] for each in order], lengths, parcels.x_ND.device)
        parcels = parcels.picked(Picks(index_M=index_M, num_rows=sum(lengths), one_each=True))
        counts = [sum(lengths[i : i + self.mesh.size]) for i in range(0, len(lengths), self.mesh.size)]
        return Arrived(x_MD=parcels.rows(), counts=tuple(counts), parcels=parcels)

    def depart(self, arrived: Arrived, y_MD: Tensor) -> Parcels:
        """What the experts made of the rows, at the begin of the way back."""
        return replace(arrived.parcels, x_ND=y_MD)

    def exchange(self, parcels: Parcels, *axes: Axis) -> Parcels:
        parcels, leg = parcels.landed(), self._legs[parcels.step]
        assert leg.step.arguments == axes
        group = self._group.along(axes)
        if group is None:
            # every block stays where it is, and in its order
            return replace(parcels, step=parcels.step + 1, trail=(*parcels.trail, _NOWHERE))
        parcels = parcels.ordered(tuple(block for blocks in leg.sent for block in blocks))
        route = Route(
            group=group,
            peers=leg.peers,
            rank=self._group.rank,
            rows=self._splits(parcels.row_sizes, leg),
            labels=self._splits(parcels.label_sizes, leg) if parcels.labels is not None else ((), ()),
            ledger=self._ledger,
            layer=self.layer,
            shared=self._group.lines.of(group),
            far=self.mesh.nodes > 1 and "node" in axes,
        )
        sent = Sent(picks=parcels.picks, weight_M=parcels.weight_M, route=route)
        arriving = _sent(parcels.rows(), parcels.labels, route)
        return replace(
            parcels,
            x_ND=arriving.token,
            arriving=arriving,
            labels=None,
            picks=None,
            weight_M=None,
            blocks=leg.held,
            trail=(*parcels.trail, sent),
            step=parcels.step + 1,
        )

    def dedup(self, parcels: Parcels, unit: Merged) -> Parcels:
        parcels, leg = parcels.landed(), self._legs[parcels.step]
        if unit == "tensor":
            return replace(parcels, step=parcels.step + 1)
        if parcels.trail or parcels.picks is None or parcels.weight_M is None:
            raise ConfigError(f"dedup({unit!r}) must come first in an all-to-all program: it needs the tokens of rows")
        unit_M = spread(range(self.mesh.size), parcels.row_sizes(), parcels.x_ND.device)
        unit_M = unit_M // self.mesh.local if unit == "node" else unit_M
        token_M, num_tokens = parcels.picks.index_M, parcels.picks.num_rows
        merged = replace(parcels, packing=unit, blocks=leg.held)
        sizes = merged.row_sizes()
        row_M = _numbered(unit_M * num_tokens + token_M, len(leg.held) * num_tokens)
        first_U = placed(starts(sizes), row_M.device)
        labels = Labels(row_J=row_M - first_U[unit_M], weight_J=parcels.weight_M)
        picks = Picks(index_M=_members(row_M, token_M, sum(sizes)), num_rows=num_tokens, one_each=False)
        return replace(merged, picks=picks, weight_M=None, labels=labels, step=parcels.step + 1)

    def expand(self, parcels: Parcels, unit: Finer) -> Parcels:
        parcels, leg = parcels.landed(), self._legs[parcels.step]
        done = replace(parcels, blocks=leg.held, step=parcels.step + 1)
        if unit == "tensor" or parcels.packing == unit:
            return done
        assert parcels.labels is not None
        old_J, num_rows = parcels.label_rows(), sum(parcels.row_sizes())
        if unit == "assignment":
            # labels lie as assignments do
            picked = parcels.picked(Picks(index_M=old_J, num_rows=num_rows, one_each=False))
            weight_M = parcels.labels.weight_J
            return replace(done, picks=picked.picks, packing="assignment", labels=None, weight_M=weight_M)
        return self._to_ranks(parcels, replace(done, packing="rank"), old_J, num_rows)

    def exchange_back(self, parcels: Parcels, *axes: Axis) -> Parcels:
        *before, sent = parcels.trail
        parcels = replace(parcels.landed(), trail=tuple(before))
        if sent.route is None:
            return parcels
        arriving = send_rows(parcels.sums(), sent.route.turned())
        return replace(parcels, x_ND=arriving.token, arriving=arriving, picks=sent.picks, weight_M=sent.weight_M)

    def dedup_back(self, parcels: Parcels, unit: Merged) -> Parcels:
        # the picks that an exchange left say which rows are summed, here and in `expand_back`
        return parcels

    def expand_back(self, parcels: Parcels, unit: Finer, packing: Packing) -> Parcels:
        return parcels

    def _splits(self, sizes: Callable[[Blocks], list[int]], leg: Leg) -> Splits:
        return tuple(sum(sizes(blocks)) for blocks in leg.sent), tuple(sum(sizes(blocks)) for blocks in leg.received)

    def _to_ranks(self, parcels: Parcels, after: Parcels, old_J: Tensor, num_rows: int) -> Parcels:
        """Rows merged per node become rows per rank of it: those that have an assignment there, in their order."""
        device, local = old_J.device, self.mesh.local
        sizes, old_blocks = after.row_sizes(), parcels.row_sizes()
        block_J = spread(range(len(after.blocks)), after.label_sizes(), device)
        # row i of node block b as a row of its rank l: places b * local + l in turn, as many rows as the block has
        place_B = placed(_place_of_blocks(old_blocks, local), device)
        key_J = place_B[block_J] + _labels_of(parcels).row_J
        row_J = _numbered(key_J, num_rows * local)
        first_B = placed(starts(sizes), device)
        labels = replace(_labels_of(parcels), row_J=row_J - first_B[block_J])
        picks = Picks(index_M=_members(row_J, old_J, sum(sizes)), num_rows=num_rows, one_each=False)
        return replace(after, picks=parcels.picked(picks).picks, labels=labels)


_NOWHERE = Sent(picks=None, weight_M=None, route=None)


def _sent(rows: Tensor, labels: Labels | None, route: Route) -> SentRows | SentLabelled:
    if labels is None:
        return send_rows(rows, route)
    return send_labelled(rows, labels.weight_J, labels.row_J, route)


def _labels_of(parcels: Parcels) -> Labels:
    assert parcels.labels is not None
    return parcels.labels


def _numbered(key_J: Tensor, num_keys: int) -> Tensor:
    """The rank of each key among the keys that occur, equal keys alike; nothing is read back from the device."""
    occurs = torch.zeros(num_keys, dtype=torch.int64, device=key_J.device).index_fill_(0, key_J, 1)
    return occurs.cumsum(0)[key_J] - 1


def _members(row_J: Tensor, member_J: Tensor, num_rows: int) -> Tensor:
    """What each row is one of: all of its labels say the same."""
    return torch.zeros(num_rows, dtype=torch.int64, device=row_J.device).scatter_(0, row_J, member_J)


def _place_of_blocks(sizes: Sequence[int], local: int) -> list[int]:
    """First key of every (node block, rank of the node)."""
    begin = starts([size * local for size in sizes])
    return [first + rank * size for first, size in zip(begin, sizes, strict=True) for rank in range(local)]
