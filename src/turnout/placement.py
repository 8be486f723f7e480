"""Placement: which rank of an expert group holds which experts, and where one rank stands among them.

An expert may stand on several ranks: each then has a copy of it, and gets a part of its rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from turnout.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """Neighbouring experts that lie side by side on a rank; one with copies is a run of its own wherever it lies."""

    expert: int  # the first of them
    rank: int
    row: int  # where that one lies among the experts of its rank
    length: int


@dataclass(frozen=True)
class Placement:
    """Rank r holds the slots bounds[r] .. bounds[r + 1] - 1, and slot s the expert order[s]."""

    bounds: tuple[int, ...]
    order: tuple[int, ...] = ()  # of experts, slot by slot; empty: slot s holds expert s. Copies: in several slots

    def __post_init__(self) -> None:
        rises = all(before < after for before, after in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not rises:
            raise ConfigError(f"placement.bounds={self.bounds} must start at 0 and rise: every rank holds an expert")
        if self.order:
            self._check_order()
        if self.order == tuple(range(self.bounds[-1])):
            # one placement is one value
            object.__setattr__(self, "order", ())

    def _check_order(self) -> None:
        slots, every = self.bounds[-1], set(range(max(self.order) + 1))
        if len(self.order) != slots or set(self.order) != every:
            raise ConfigError(
                f"placement.order={self.order} must hold in {slots} slots each of the experts 0, 1, ... once, or more "
                "often where it has copies"
            )
        for rank in range(self.ranks):
            experts = self.experts_of(rank)
            twice = next((expert for expert in experts if experts.count(expert) > 1), None)
            if twice is not None:
                raise ConfigError(
                    f"placement.order={self.order}: rank {rank} holds expert {twice} more than once; copies lie on "
                    "different ranks"
                )

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
        return cls.holding([[expert for expert, at in enumerate(rank_of) if at == rank] for rank in range(ranks)])

    @classmethod
    def holding(cls, held: Sequence[Sequence[int]]) -> "Placement":
        """The experts of each rank, in the order it holds them; those that several ranks hold have copies.

        Raises: ConfigError if a rank holds none, an expert lies nowhere, or twice on a rank.
        """
        bounds = [0]
        for experts in held:
            bounds.append(bounds[-1] + len(experts))
        return cls(tuple(bounds), tuple(expert for experts in held for expert in experts))

    @property
    def num_slots(self) -> int:
        """Experts of all ranks, copies counted."""
        return self.bounds[-1]

    @cached_property
    def num_experts(self) -> int:
        return max(self.order) + 1 if self.order else self.num_slots

    @property
    def has_copies(self) -> bool:
        return self.num_slots > self.num_experts

    @cached_property
    def copied(self) -> tuple[int, ...]:
        """The experts that several ranks hold, in rising order."""
        return tuple(expert for expert, ranks in enumerate(self.ranks_of) if len(ranks) > 1)

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def expert_at(self) -> tuple[int, ...]:
        """The expert of each slot."""
        return self.order or tuple(range(self.num_slots))

    @cached_property
    def ranks_of(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold each expert, in rising order: one, where it has no copies."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank in range(self.ranks):
            for expert in self.experts_of(rank):
                found[expert].append(rank)
        return tuple(map(tuple, found))

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank of each expert; of one with copies the first."""
        return tuple(ranks[0] for ranks in self.ranks_of)

    @cached_property
    def rank_at(self) -> tuple[int, ...]:
        """The rank of each slot."""
        return tuple(rank for rank in range(self.ranks) for _ in self.slots_of(rank))

    def slots_of(self, rank: int) -> range:
        """The slots of a rank."""
        return range(self.bounds[rank], self.bounds[rank + 1])

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The experts a rank holds, in the order it holds them."""
        slots = self.slots_of(rank)
        return self.order[slots.start : slots.stop] or tuple(slots)

    def experts_near(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """The experts that some ranks hold together, those of a host, in rising order."""
        return tuple(sorted({expert for rank in ranks for expert in self.experts_of(rank)}))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All experts once, neighbours on neighbouring slots of a rank together; in order of the experts."""
        every = [run for rank in range(self.ranks) for run in self.runs_of(rank)]
        return tuple(sorted((run for run in every if run.rank == self.rank_of[run.expert]), key=lambda run: run.expert))

    def runs_of(self, rank: int) -> tuple[Run, ...]:
        """Those of a rank, in the order it holds them."""
        return self._runs[rank]

    @cached_property
    def _runs(self) -> tuple[tuple[Run, ...], ...]:
        return tuple(tuple(self._runs_on(rank)) for rank in range(self.ranks))

    def _runs_on(self, rank: int) -> Iterator[Run]:
        experts, begin = self.experts_of(rank), 0
        for row in range(1, len(experts) + 1):
            goes_on = (
                row < len(experts)
                and experts[row] == experts[row - 1] + 1
                # what several ranks hold is the same piece on all of them
                and len(self.ranks_of[experts[row]]) == len(self.ranks_of[experts[row - 1]]) == 1
            )
            if not goes_on:
                yield Run(experts[begin], rank, begin, row - begin)
                begin = row


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
        """Of `groups` equal runs of neighbouring experts, the most units of `ranks_each` ranks that one lies on, with
        all copies.

        Raises: ConfigError unless the groups divide the experts.
        """
        num_experts = self.placement.num_experts
        if num_experts % groups:
            raise ConfigError(f"groups={groups} must divide num_experts={num_experts}")
        size = num_experts // groups
        units = [{rank // ranks_each for rank in ranks} for ranks in self.placement.ranks_of]
        return max(len(set().union(*units[first : first + size])) for first in range(0, num_experts, size))
