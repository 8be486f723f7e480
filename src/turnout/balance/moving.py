"""What a move of experts sends, to the byte: shown before it is made, and what the ledger then counts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turnout.alltoall import Traffic
from turnout.balance.cost import Cost
from turnout.balance.errands import expert_moves
from turnout.placement import Placement
from turnout.topology import Mesh


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


def by_rank(pairs: Mapping[tuple[int, int], int], mesh: Mesh) -> list[Traffic]:
    """What each rank sends, inside its node and to others; without messages."""
    found = [Traffic()] * mesh.size
    for (sender, receiver), size in pairs.items():
        found[sender] += Traffic.between(sender, receiver, mesh, size)
    return found


@dataclass(frozen=True, kw_only=True)
class Move:
    """The experts of one layer go to other ranks, and why."""

    layer: str
    before: Placement
    after: Placement
    cost: tuple[Cost, Cost]  # of what was routed, before and after
    inter_bytes: int  # that move between nodes, in one expert group
    intra_bytes: int  # and inside them
    tokens: float  # of a step, whose rows the costs are of
    period: int  # steps in which it must pay for itself

    @property
    def experts(self) -> int:
        """How many go to another rank, or get a copy there."""
        return len({expert for expert, _, _ in expert_moves(self.before, self.after)})

    @property
    def saved_s(self) -> float:
        """Seconds that are predicted to be saved until the next question, without those of the move."""
        return self.period * (self.cost[0].step_s - self.cost[1].step_s)

    def __str__(self) -> str:
        load = " -> ".join(f"{cost.max_load:.2f}" for cost in self.cost)
        far = " -> ".join(f"{cost.inter_bytes / max(self.tokens, 1.0):,.0f}" for cost in self.cost)
        copied = ", ".join(map(str, self.after.copied))
        copies = f"experts {copied} have copies; " if copied else ""
        return (
            f"{self.layer}: {self.experts} of {self.after.num_experts} experts move; {copies}fullest rank {load} "
            f"of the mean, between hosts {far} bytes a token; {self.inter_bytes:,} bytes are sent between hosts and "
            f"{self.intra_bytes:,} inside, {1e3 * self.cost[1].move_s:.3g} ms, to save {1e3 * self.saved_s:.3g} ms in "
            f"{self.period} steps"
        )
