"""Which of an expert's rows go to which of its copies: every rank decides alone, and in the same way each time.

Think of every rank as having as much for the expert as any other, in as many parts as there are copies: then each copy
has room for as many parts as there are ranks. What a rank holds itself takes its parts first; what is left goes to
copies on the rank's node as long as they have room, and then to any that has. So copies get the same, and no more rows
leave a node than must. The rows of a rank go to the copies of its parts in turn, in the order of the queue.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from turnout.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Pieces of what one rank has for experts: every stride-th of the rows for one, from the first on, go to a slot."""

    slot: tuple[int, ...]  # in rising order; one without a piece gets nothing
    expert: tuple[int, ...]
    first: tuple[int, ...]
    stride: tuple[int, ...]


@lru_cache(maxsize=256)
def dealt(placement: Placement, rank: int, node_size: int) -> Deal:
    """How `rank` deals its rows; `node_size`: neighbouring ranks on a node."""
    pieces = [
        (slot, expert, first, len(turn))
        for slot, (expert, at) in enumerate(zip(placement.expert_at, placement.rank_at, strict=True))
        for turn in (turns(placement.ranks_of[expert], placement.ranks, node_size)[rank],)
        for first, to in enumerate(turn)
        if to == at
    ]
    slot, expert, first, stride = zip(*pieces, strict=True)
    return Deal(slot=slot, expert=expert, first=first, stride=stride)


@lru_cache(maxsize=4096)
def turns(holders: tuple[int, ...], ranks: int, node_size: int) -> tuple[tuple[int, ...], ...]:
    """For each rank the ranks of the copies that its rows go to in turn; `holders`: a rank for each copy."""
    copies = len(holders)
    if copies == 1:
        return (holders,) * ranks
    left, room = [copies] * ranks, [ranks * holders.count(rank) for rank in range(ranks)]
    found: list[list[int]] = [[] for _ in range(ranks)]
    nodes = [range(first, first + node_size) for first in range(0, ranks, node_size)]
    for group in (*([rank] for rank in range(ranks)), *nodes, range(ranks)):
        # as many as there are of both
        for source, to in zip(list(_in_rounds(group, left)), list(_in_rounds(group, room, turned=False)), strict=False):
            found[source].append(to)
            left[source] -= 1
            room[to] -= 1
    return tuple(tuple(turn[:1] if len(set(turn)) == 1 else turn) for turn in found)


def _in_rounds(ranks: Sequence[int], number: Sequence[int], *, turned: bool = True) -> Iterator[int]:
    """Each rank as often as its number says, one of each in a round; `turned`: each round begins with the next."""
    for round_ in range(max(number[rank] for rank in ranks)):
        those = [rank for rank in ranks if number[rank] > round_]
        at = round_ % len(those) if turned else 0
        yield from (*those[at:], *those[:at])
