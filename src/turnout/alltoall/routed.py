"""Rows from each rank to each other, counted from tokens whose destinations are known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from turnout.alltoall.transport import Packing
from turnout.errors import ConfigError
from turnout.topology import Mesh


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens whose destinations are known: a recorded or simulated routing, counted exactly."""

    mesh: Mesh
    destinations: Sequence[Sequence[Sequence[int]]]  # [source rank][token][choice] = rank of the expert

    def __post_init__(self) -> None:
        if len(self.destinations) != self.mesh.size:
            raise ConfigError(f"destinations has {len(self.destinations)} ranks; the mesh has {self.mesh.size}")
        for source in self.destinations:
            for token in source:
                for rank in token:
                    self.mesh.place(rank)

    @property
    def sources(self) -> range:
        return range(self.mesh.size)

    def tokens(self, source: int) -> int:
        return len(self.destinations[source])

    def destinations_of(self, source: int) -> Iterator[tuple[int, int]]:
        """Every rank, and for how many it stands: itself."""
        return ((rank, 1) for rank in range(self.mesh.size))

    def rows(self, packing: Packing, source: int, destination: int) -> int:
        """Rows of `source` for a rank, or for its node when packed per node."""
        return self._rows[packing][source][destination // self._unit(packing)]

    def labels(self, packing: Packing, source: int, destination: int) -> int:
        """Assignments those rows stand for."""
        unit = self._unit(packing)
        first = destination // unit * unit
        return sum(self._rows["assignment"][source][first : first + unit])

    def _unit(self, packing: Packing) -> int:
        return self.mesh.local if packing == "node" else 1

    def share(self, index: int, of: int) -> "RoutedTokens":
        """Every `of`-th token from `index` on."""
        return RoutedTokens(self.mesh, [source[index::of] for source in self.destinations])

    @cached_property
    def _rows(self) -> dict[str, list[list[int]]]:
        ranks, nodes = self.mesh.size, self.mesh.nodes
        rows = {"assignment": _zeros(ranks, ranks), "rank": _zeros(ranks, ranks), "node": _zeros(ranks, nodes)}
        for source, tokens in enumerate(self.destinations):
            for token in tokens:
                for rank in token:
                    rows["assignment"][source][rank] += 1
                for rank in set(token):
                    rows["rank"][source][rank] += 1
                for node in {rank // self.mesh.local for rank in token}:
                    rows["node"][source][node] += 1
        return rows


def _zeros(rows: int, columns: int) -> list[list[int]]:
    return [[0] * columns for _ in range(rows)]
