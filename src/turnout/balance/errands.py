"""Which expert goes from which rank to which: in a move, and gradients of copies in each step."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from turnout.errors import ConfigError
from turnout.placement import Placement


def expert_moves(before: Placement, after: Placement) -> Iterator[tuple[int, int, int]]:
    """(expert, from rank, to rank) wherever a rank gets an expert that it did not hold, in order.

    Of several ranks that hold it the nearest sends it: one of the same node, where a node has 2, 4, 8, ... ranks.
    Raises: ConfigError if the placements are of other experts or ranks.
    """
    if (before.num_experts, before.ranks) != (after.num_experts, after.ranks):
        raise ConfigError(
            f"{after.num_experts} experts on {after.ranks} ranks cannot follow {before.num_experts} on {before.ranks}: "
            "a move keeps experts and ranks"
        )
    ends = zip(before.ranks_of, after.ranks_of, strict=True)
    return (
        # ranks whose numbers begin alike are neighbours
        (expert, min(old, key=lambda rank: rank ^ to), to)
        for expert, (old, new) in enumerate(ends)
        for to in new
        if to not in old
    )


def home_of(placement: Placement, expert: int) -> int:
    """The rank that adds up the gradients of an expert's copies: not the same for all that the same ranks hold."""
    ranks = placement.ranks_of[expert]
    return ranks[expert % len(ranks)]


def twins(placement: Placement) -> Iterator[tuple[int, int]]:
    """(from rank, to rank) of every gradient of an expert that travels in a step: a copy's home, and the sum back."""
    for expert in placement.copied:
        home = home_of(placement, expert)
        for rank in placement.ranks_of[expert]:
            if rank != home:
                yield rank, home
                yield home, rank


def twin_bytes(placement: Placement, slice_bytes: Sequence[int]) -> dict[tuple[int, int], int]:
    """(sender, receiver) -> bytes of those, of ranks of the whole group, in which slices of an expert are neighbours.

    `slice_bytes`: of each slice of one expert, the gradients of its weights.
    """
    slices, found = len(slice_bytes), defaultdict[tuple[int, int], int](int)
    for old, new in twins(placement):
        for at, size in enumerate(slice_bytes):
            if size:
                found[old * slices + at, new * slices + at] += size
    return dict(found)
