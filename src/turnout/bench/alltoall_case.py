"""What `turnout bench alltoall` measures: who sends what to whom, over which links. Never imports torch."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from turnout.alltoall import PROGRAMS, RoutedTokens
from turnout.bench.lab import Links
from turnout.config import from_dict, to_dict
from turnout.errors import ConfigError
from turnout.registry import nearest
from turnout.topology import Mesh

ALL_GATHER = "all_gather"  # everybody has every token: no program of ours, but what they are weighed against
_ELEMENT_BYTES = 4
_MOST_RANKS = 256


@dataclass(frozen=True, kw_only=True)
class ExchangeCase:
    """One exchange on some ranks, of several row sizes and by several programs in turns."""

    hosts: int = 2
    ranks: int = 4  # of each host
    lab: bool = False  # hosts are namespaces with links between them; else all ranks are on this machine's loopback
    links: Links = field(default_factory=Links)  # between the hosts of a lab
    programs: tuple[str, ...] = ()  # empty: all, and all_gather
    row_bytes: tuple[int, ...] = (16, 1024, 4096, 16384, 65536)  # of one token's vector
    tokens: int = 0  # of each rank; 0: as many as there are experts, so that k=1 sends one row to each
    experts: int = 0  # 0: one a rank
    k: int = 1  # choices of a token: one each in turn if k=1, else drawn at random
    share_memory: bool = False  # measure ranks of one host through their memory too
    rounds: int = 20
    warmup: int = 3
    repeat: int = 1  # exchanges in a row, of which a round has the mean: one alone begins with waking up

    def __post_init__(self) -> None:
        for name in ("hosts", "ranks", "k", "rounds", "repeat"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mesh.size > _MOST_RANKS or self.mesh.size < 2:
            raise ConfigError(f"hosts={self.hosts} times ranks={self.ranks} must be in 2..{_MOST_RANKS} processes")
        odd = next((size for size in self.row_bytes if size < 1 or size % _ELEMENT_BYTES), None)
        if odd is not None:
            near = max(_ELEMENT_BYTES, round(odd / _ELEMENT_BYTES) * _ELEMENT_BYTES)
            raise ConfigError(f"row_bytes={odd} must be a multiple of {_ELEMENT_BYTES}; nearest legal: {near}")
        if self.num_experts % self.mesh.size:
            near = max(1, round(self.num_experts / self.mesh.size)) * self.mesh.size
            raise ConfigError(
                f"experts={self.experts} must be a multiple of the {self.mesh.size} ranks; nearest legal: {near}"
            )
        if self.k > self.num_experts:
            raise ConfigError(f"k={self.k} must be at most the {self.num_experts} experts")
        for name in self.programs:
            known = [*PROGRAMS.names(), ALL_GATHER]
            if name not in known:
                raise ConfigError(f"unknown program {name!r}; available: {', '.join(known)}{nearest(name, known)}")

    @property
    def mesh(self) -> Mesh:
        return Mesh(nodes=self.hosts, local=self.ranks)

    @property
    def num_experts(self) -> int:
        return self.experts or self.mesh.size

    @property
    def num_tokens(self) -> int:
        """Of each rank."""
        return self.tokens or self.num_experts

    @property
    def names(self) -> tuple[str, ...]:
        """The programs to run: always flat too, for the others are compared with it."""
        asked = self.programs or (*PROGRAMS.names(), ALL_GATHER)
        return tuple(dict.fromkeys(("flat", *asked)))

    def choices(self, rank: int) -> Sequence[Sequence[int]]:
        """[token][choice] = expert, the same on every rank that asks."""
        if self.k == 1:
            return [[token % self.num_experts] for token in range(self.num_tokens)]
        draw = random.Random(rank)
        return [draw.sample(range(self.num_experts), self.k) for _ in range(self.num_tokens)]

    @cached_property
    def routing(self) -> RoutedTokens:
        """Where everybody's tokens go."""
        each = self.num_experts // self.mesh.size
        ranks = range(self.mesh.size)
        return RoutedTokens(
            self.mesh, [[[expert // each for expert in token] for token in self.choices(rank)] for rank in ranks]
        )

    def to_json(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ExchangeCase":
        return from_dict(cls, dict(data))
