"""What a move of experts sends, to the byte: shown before it is made, and what the ledger then counts."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from turnout.alltoall import Traffic
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Mesh


def expert_moves(before: Placement, after: Placement) -> Iterator[tuple[int, int, int]]:
    """(expert, from rank, to rank) of every expert that changes its rank, in order.

    Raises: ConfigError if the placements are of other experts or ranks.
    """
    if (before.num_experts, before.ranks) != (after.num_experts, after.ranks):
        raise ConfigError(
            f"{after.num_experts} experts on {after.ranks} ranks cannot follow {before.num_experts} on {before.ranks}: "
            "a move keeps experts and ranks"
        )
    ends = zip(before.rank_of, after.rank_of, strict=True)
    return ((expert, old, new) for expert, (old, new) in enumerate(ends) if old != new)


def moved_bytes(before: Placement, after: Placement, slice_bytes: Sequence[int]) -> dict[tuple[int, int], int]:
    """(sender, receiver) -> bytes, of ranks of the whole expert group, in which slices of an expert are neighbours.

    `slice_bytes`: of each slice of one expert, its weights and what the optimizer keeps of them.
    """
    slices, found = len(slice_bytes), defaultdict[tuple[int, int], int](int)
    for _, old, new in expert_moves(before, after):
        for at, size in enumerate(slice_bytes):
            if size:
                found[old * slices + at, new * slices + at] += size
    return dict(found)


def by_rank(pairs: dict[tuple[int, int], int], mesh: Mesh) -> list[Traffic]:
    """What each rank sends, inside its node and to others; without messages."""
    found = [Traffic()] * mesh.size
    for (sender, receiver), size in pairs.items():
        is_near = mesh.place(sender)[0] == mesh.place(receiver)[0]
        found[sender] += Traffic(intra_bytes=size) if is_near else Traffic(inter_bytes=size)
    return found
