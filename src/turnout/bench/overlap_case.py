"""What `turnout bench overlap` measures: one layer, its experts over hosts, in chunks. Never imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from turnout.bench.lab import Links
from turnout.config import from_dict, to_dict
from turnout.errors import ConfigError
from turnout.topology import Mesh
from turnout.tune.predict import CHUNKS

MODES = ("forward", "train")


@dataclass(frozen=True, kw_only=True)
class OverlapCase:
    """A layer on ranks of one thread each; experts over all of them."""

    hosts: int = 2
    ranks: int = 1  # of each host: with two cores one rank a core, so that waiting is for the link and not for a core
    lab: bool = False  # hosts are namespaces with links between them; else all ranks are on this machine's loopback
    links: Links = field(default_factory=Links)  # between the hosts of a lab
    tokens: int = 4096  # of each rank
    dim: int = 256  # of the model
    hidden: int = 512  # of an expert
    experts: int = 8
    k: int = 2  # choices of a token
    chunks: tuple[int, ...] = (1, 2, 4, 8)  # degrees of overlap
    modes: tuple[str, ...] = MODES  # train: forward and backward
    rounds: int = 20
    warmup: int = 3
    tune: bool = False  # let the tuner choose among the chunks too

    def __post_init__(self) -> None:
        for name in ("hosts", "ranks", "tokens", "dim", "hidden", "experts", "k", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mesh.size < 2:
            raise ConfigError(f"hosts={self.hosts} times ranks={self.ranks} must be at least 2 processes")
        if self.experts % self.mesh.size:
            near = max(1, round(self.experts / self.mesh.size)) * self.mesh.size
            raise ConfigError(
                f"experts={self.experts} must be a multiple of the {self.mesh.size} ranks; nearest legal: {near}"
            )
        if self.k > self.experts:
            raise ConfigError(f"k={self.k} must be at most the {self.experts} experts")
        for name, asked, legal in (("chunks", self.chunks, CHUNKS), ("modes", self.modes, MODES)):
            odd = next((each for each in asked if each not in legal), None)
            if odd is not None or not asked:
                raise ConfigError(f"{name}={asked} must be some of {', '.join(map(str, legal))}")
        if 1 not in self.chunks:
            raise ConfigError(f"chunks={self.chunks} must have 1 among them: the others are compared with it")

    @property
    def mesh(self) -> Mesh:
        return Mesh(nodes=self.hosts, local=self.ranks)

    def to_json(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "OverlapCase":
        return from_dict(cls, dict(data))
