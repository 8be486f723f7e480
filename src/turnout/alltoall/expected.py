"""Expected rows from each rank to each other: under uniform routing, or under the loads of a recorded trace."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod

from turnout.alltoall.transport import Packing
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Mesh


@dataclass(frozen=True, kw_only=True)
class UniformRouting:
    """Every expert as likely as any other: expected rows, the same from each rank, so one source stands for all."""

    mesh: Mesh
    num_tokens: float  # tokens a rank routes
    top_k: int
    num_experts: int
    capacity_factor: float = 1.0  # padded buffers send this many times their mean, full or not
    node_limit: int = 0  # nodes a token may reach (DeepSeek's M); 0: all

    def __post_init__(self) -> None:
        even = self.num_experts % self.mesh.size == 0
        if self.num_experts < self.mesh.size:
            raise ConfigError(f"num_experts={self.num_experts} must be at least the {self.mesh.size} expert ranks")
        if self.node_limit and not even:
            raise ConfigError(
                f"node_limit={self.node_limit} is of nodes with as many experts each, and {self.num_experts} on "
                f"{self.mesh.size} ranks are not; nearest legal: node_limit=0"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k={self.top_k} must be in 1..{self.num_experts} (num_experts)")
        if self.capacity_factor <= 0:
            raise ConfigError(f"capacity_factor={self.capacity_factor} must be above 0; nearest legal: 1.0")

    @property
    def sources(self) -> range:
        return range(1)

    def tokens(self, source: int) -> float:
        return self.num_tokens

    def destinations_of(self, source: int) -> Iterator[tuple[int, int]]:
        """A rank of each kind - itself, its node's, its rail's, the rest - and how many there are of the kind."""
        node, local = self.mesh.place(source)
        for other_node, nodes in ((node, 1), ((node + 1) % self.mesh.nodes, self.mesh.nodes - 1)):
            for other_local, locals_ in ((local, 1), ((local + 1) % self.mesh.local, self.mesh.local - 1)):
                if nodes * locals_:
                    yield self.mesh.rank(other_node, other_local), nodes * locals_

    def rows(self, packing: Packing, source: int, destination: int) -> float:
        """Expected rows of a source for a rank, or for its node when packed per node."""
        if packing != "assignment" and self.capacity_factor != 1.0:
            raise ConfigError(
                f"capacity_factor={self.capacity_factor} pads rows per expert, which a program that merges them does "
                "not send; nearest legal: 1.0, or a program that sends each by itself, such as flat"
            )
        units = self._units(packing)
        per_token = self.top_k * self.capacity_factor if packing == "assignment" else self._distinct(units)
        return self.num_tokens * per_token / units

    def labels(self, packing: Packing, source: int, destination: int) -> float:
        """Expected assignments those rows stand for."""
        return self.num_tokens * self.top_k / self._units(packing)

    def _units(self, packing: Packing) -> int:
        return self.mesh.nodes if packing == "node" else self.mesh.size

    def _distinct(self, units: int) -> float:
        """Nodes or ranks a token reaches."""
        if self.num_experts % self.mesh.size:
            return _distinct_of(_sizes(self.num_experts, self.mesh.size, units), self.num_experts, self.top_k)
        nodes = self.node_limit or self.mesh.nodes
        if nodes >= self.mesh.nodes:
            return expected_distinct(self.num_experts, units, self.top_k)
        if units == self.mesh.nodes:
            return min(expected_distinct(self.num_experts, units, self.top_k), nodes)
        # the ranks of the nodes it may reach
        ranks = nodes * self.mesh.local
        return expected_distinct(self.num_experts // self.mesh.size * ranks, ranks, self.top_k)

    def share(self, index: int, of: int) -> "UniformRouting":
        """One of `of` equal shares of the tokens."""
        return replace(self, num_tokens=self.num_tokens / of)


@dataclass(frozen=True, kw_only=True)
class LoadedRouting:
    """Experts of unequal load, as a recorded trace has them; a rank's tokens choose like any other's.

    Rows per assignment are the loads' own. Rows merged per rank or node are estimated: a token misses a unit with share
    q of the load as if it drew its k experts from E of which E q are there, which is exact when loads are equal.
    """

    mesh: Mesh
    num_tokens: float  # tokens a rank routes
    top_k: int
    loads: tuple[float, ...]  # assignments of each expert, in any unit

    def __post_init__(self) -> None:
        if len(self.loads) < self.mesh.size:
            raise ConfigError(
                f"loads has {len(self.loads)} experts; there must be at least the {self.mesh.size} expert ranks"
            )
        if min(self.loads) < 0 or sum(self.loads) <= 0:
            raise ConfigError(f"loads must be at least 0 and not all 0; the smallest is {min(self.loads)}")
        if not 1 <= self.top_k <= len(self.loads):
            raise ConfigError(f"top_k={self.top_k} must be in 1..{len(self.loads)} (experts)")

    @property
    def sources(self) -> range:
        return range(self.mesh.size)

    def tokens(self, source: int) -> float:
        return self.num_tokens

    def destinations_of(self, source: int) -> Iterator[tuple[int, int]]:
        """Every rank, and for how many it stands: itself."""
        return ((rank, 1) for rank in range(self.mesh.size))

    def rows(self, packing: Packing, source: int, destination: int) -> float:
        """Expected rows of a source for a rank, or for its node when packed per node."""
        if packing == "assignment":
            return self.labels(packing, source, destination)
        share, experts = self._share(packing, destination), len(self.loads)
        missed = prod(max(0.0, experts * (1 - share) - i) / (experts - i) for i in range(self.top_k))
        return self.num_tokens * (1 - missed)

    def labels(self, packing: Packing, source: int, destination: int) -> float:
        """Expected assignments those rows stand for."""
        return self.num_tokens * self.top_k * self._share(packing, destination)

    def share(self, index: int, of: int) -> "LoadedRouting":
        """One of `of` equal shares of the tokens."""
        return replace(self, num_tokens=self.num_tokens / of)

    def skew(self) -> float:
        """Assignments of the busiest rank over the mean: what the slowest rank's time is multiplied by."""
        return max(self._shares["assignment"]) * self.mesh.size

    def _share(self, packing: Packing, destination: int) -> float:
        if packing == "node":
            return self._shares["node"][destination // self.mesh.local]
        return self._shares["assignment"][destination]

    @cached_property
    def _shares(self) -> dict[str, list[float]]:
        total, local = sum(self.loads), self.mesh.local
        bounds = Placement.even(len(self.loads), self.mesh.size).bounds
        by_rank = [sum(self.loads[start:end]) / total for start, end in pairwise(bounds)]
        by_node = [sum(by_rank[node * local : (node + 1) * local]) for node in range(self.mesh.nodes)]
        return {"assignment": by_rank, "node": by_node}


def _sizes(num_experts: int, ranks: int, units: int) -> list[int]:
    """Experts on each of `units` of neighbouring ranks, which hold one more or less than each other."""
    bounds = Placement.even(num_experts, ranks).bounds[:: ranks // units]
    return [end - start for start, end in pairwise(bounds)]


def _distinct_of(sizes: list[int], num_experts: int, top_k: int) -> float:
    """Expected number of units a token reaches, so many experts on each."""
    missed = (prod(max(0, num_experts - size - i) / (num_experts - i) for i in range(top_k)) for size in sizes)
    return len(sizes) - sum(missed)


def expected_distinct(num_experts: int, units: int, top_k: int) -> float:
    """Expected number of `units` (nodes, ranks) a token reaches: D = N (1 - C(E - E/N, k) / C(E, k)).

    Experts lie evenly on units, every set of k experts is as likely. A token that may reach M nodes, those where its
    experts score best (DeepSeek-V3), reaches nearly all M of them: 3.95 of 4 with 256 experts, 8 nodes and 8 choices.
    Raises: ConfigError if units does not divide num_experts.
    """
    if num_experts % units:
        raise ConfigError(f"num_experts={num_experts} must be a multiple of {units} units")
    elsewhere = num_experts - num_experts // units
    missed = prod((elsewhere - i) / (num_experts - i) for i in range(top_k)) if elsewhere >= top_k else 0.0
    return units * (1.0 - missed)
