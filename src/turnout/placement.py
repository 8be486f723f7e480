"""Placement: which rank of an expert group holds which experts, and where one rank stands among them."""

from bisect import bisect_right
from dataclasses import dataclass

from turnout.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Rank r holds the experts bounds[r] .. bounds[r + 1] - 1: runs of neighbours, in order of the ranks."""

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        rises = all(before < after for before, after in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not rises:
            raise ConfigError(f"placement.bounds={self.bounds} must start at 0 and rise: every rank holds an expert")

    @classmethod
    def even(cls, num_experts: int, ranks: int) -> "Placement":
        """Runs of equal length, the first ones longer by one where the ranks do not divide the experts.

        Raises: ConfigError if a rank would hold none.
        """
        if not 1 <= ranks <= num_experts:
            raise ConfigError(
                f"{num_experts} experts cannot lie on {ranks} ranks: each holds at least one; "
                f"nearest legal: ep={max(1, min(ranks, num_experts))}"
            )
        each, longer = divmod(num_experts, ranks)
        return cls(tuple(rank * each + min(rank, longer) for rank in range(ranks + 1)))

    @property
    def num_experts(self) -> int:
        return self.bounds[-1]

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    def experts_of(self, rank: int) -> range:
        """The experts a rank holds."""
        return range(self.bounds[rank], self.bounds[rank + 1])


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where one process stands among the ranks that share the experts of a layer."""

    placement: Placement
    node_size: int  # ranks of the group on a node: neighbours, equally many on each
    rank: int  # this process's in the group

    def __post_init__(self) -> None:
        ranks = self.placement.ranks
        if not (1 <= self.node_size <= ranks and ranks % self.node_size == 0):
            raise ConfigError(f"site.node_size={self.node_size} must divide the {ranks} ranks of the placement")
        if not 0 <= self.rank < ranks:
            raise ConfigError(f"site.rank={self.rank} must be in 0..{ranks - 1}")

    @classmethod
    def alone(cls, num_experts: int) -> "Site":
        """Of a process that holds every expert."""
        return cls(placement=Placement.even(num_experts, 1), node_size=1, rank=0)

    @property
    def nodes(self) -> int:
        return self.placement.ranks // self.node_size

    @property
    def near(self) -> tuple[int, ...]:
        """The experts on the node of this process, in order."""
        first, bounds = self.rank // self.node_size * self.node_size, self.placement.bounds
        return tuple(range(bounds[first], bounds[first + self.node_size]))

    def spread(self, groups: int, ranks_each: int = 1) -> int:
        """Of `groups` equal runs of neighbouring experts, the most units of `ranks_each` ranks that one lies on.

        Raises: ConfigError unless the groups divide the experts.
        """
        num_experts = self.placement.num_experts
        if num_experts % groups:
            raise ConfigError(f"groups={groups} must divide num_experts={num_experts}")
        size = num_experts // groups
        unit = [(bisect_right(self.placement.bounds, e) - 1) // ranks_each for e in range(num_experts)]
        return max(unit[first + size - 1] - unit[first] + 1 for first in range(0, num_experts, size))
