"""Placement: which rank of an expert group holds which experts, and where one rank stands among them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from turnout.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """Neighbouring experts that lie side by side on a rank."""

    expert: int  # the first of them
    rank: int
    row: int  # where that one lies among the experts of its rank
    length: int


@dataclass(frozen=True)
class Placement:
    """Rank r holds the slots bounds[r] .. bounds[r + 1] - 1, and slot s the expert order[s]."""

    bounds: tuple[int, ...]
    order: tuple[int, ...] = ()  # of experts, slot by slot; empty: slot s holds expert s

    def __post_init__(self) -> None:
        rises = all(before < after for before, after in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not rises:
            raise ConfigError(f"placement.bounds={self.bounds} must start at 0 and rise: every rank holds an expert")
        plain = range(self.bounds[-1])
        if self.order and sorted(self.order) != list(plain):
            raise ConfigError(
                f"placement.order={self.order} must hold each of the {self.bounds[-1]} experts once; copies of an "
                "expert within a group of ranks can be planned (turnout plan placement) but not trained with"
            )
        if self.order == tuple(plain):
            # one placement is one value
            object.__setattr__(self, "order", ())

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

    @classmethod
    def of(cls, rank_of: Sequence[int], ranks: int) -> "Placement":
        """Expert e on rank rank_of[e]; the experts of a rank in rising order.

        Raises: ConfigError if a rank would hold none.
        """
        held = [[expert for expert, at in enumerate(rank_of) if at == rank] for rank in range(ranks)]
        bounds = [0]
        for experts in held:
            bounds.append(bounds[-1] + len(experts))
        return cls(tuple(bounds), tuple(expert for experts in held for expert in experts))

    @property
    def num_experts(self) -> int:
        return self.bounds[-1]

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def expert_at(self) -> tuple[int, ...]:
        """The expert of each slot."""
        return self.order or tuple(range(self.num_experts))

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank of each expert."""
        found = [0] * self.num_experts
        for rank in range(self.ranks):
            for expert in self.experts_of(rank):
                found[expert] = rank
        return tuple(found)

    def slots_of(self, rank: int) -> range:
        """The slots of a rank."""
        return range(self.bounds[rank], self.bounds[rank + 1])

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The experts a rank holds, in the order it holds them."""
        slots = self.slots_of(rank)
        return self.order[slots.start : slots.stop] or tuple(slots)

    def experts_near(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """The experts that some ranks hold together, those of a host, in rising order."""
        return tuple(sorted(expert for rank in ranks for expert in self.experts_of(rank)))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All experts, neighbours on neighbouring slots of a rank together; in order of the experts."""
        return tuple(self._runs())

    def runs_of(self, rank: int) -> tuple[Run, ...]:
        """Those of a rank, in the order it holds them."""
        return tuple(sorted((run for run in self.runs if run.rank == rank), key=lambda run: run.row))

    def _runs(self) -> Iterator[Run]:
        row = {expert: at for rank in range(self.ranks) for at, expert in enumerate(self.experts_of(rank))}
        begin = 0
        for expert in range(1, self.num_experts + 1):
            goes_on = (
                expert < self.num_experts
                and self.rank_of[expert] == self.rank_of[begin]
                and row[expert] == row[begin] + expert - begin
            )
            if not goes_on:
                yield Run(begin, self.rank_of[begin], row[begin], expert - begin)
                begin = expert


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
        first = self.rank // self.node_size * self.node_size
        return self.placement.experts_near(range(first, first + self.node_size))

    def spread(self, groups: int, ranks_each: int = 1) -> int:
        """Of `groups` equal runs of neighbouring experts, the most units of `ranks_each` ranks that one lies on.

        Raises: ConfigError unless the groups divide the experts.
        """
        num_experts = self.placement.num_experts
        if num_experts % groups:
            raise ConfigError(f"groups={groups} must divide num_experts={num_experts}")
        size = num_experts // groups
        unit = [rank // ranks_each for rank in self.placement.rank_of]
        return max(len(set(unit[first : first + size])) for first in range(0, num_experts, size))
