"""What `turnout bench tuner` measures: a layer whose experts get more rows, and fewer again. Never imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from turnout.bench.lab import Links
from turnout.config import from_dict, to_dict
from turnout.errors import ConfigError
from turnout.topology import Mesh

SWING = 4.38  # most over least capacity of one training: Hwang et al. 2022, Tutel, arXiv:2206.03382, figure 1


@dataclass(frozen=True, kw_only=True)
class ScheduleCase:
    """A layer on ranks of one thread each, experts over all of them, each sliced over `etp` neighbours."""

    hosts: int = 2
    ranks: int = 2  # of each host
    lab: bool = False  # hosts are namespaces with links between them; else all ranks are on this machine's loopback
    links: Links = field(default_factory=Links)  # between the hosts of a lab
    etp: int = 2  # ranks that share an expert: Tutel's r is 0 or a divisor of it
    dim: int = 256  # of the model
    hidden: int = 192  # of an expert
    experts: int = 4
    k: int = 2  # choices of a token
    least: int = 512  # rows of an expert, of all ranks together, where the schedule is lowest
    swing: float = SWING  # rows where it is highest, over those
    levels: int = 4  # between them, both included, by equal factors
    hold: int = 5  # steps of each level before the next
    periods: int = 1  # of the measured schedule: up and down again
    most_steps: int = 200  # of a level, to learn in
    most_periods: int = 8  # of the schedule, to learn in after that
    then_mbit: float = 0.0  # rate of the lab's cards in a second schedule, which nobody is told of; 0: there is none
    trials: int = 5  # steps in which the tuner measures a candidate

    def __post_init__(self) -> None:
        for name in (
            "hosts",
            "ranks",
            "etp",
            "dim",
            "hidden",
            "experts",
            "k",
            "least",
            "hold",
            "periods",
            "most_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.levels < 2:
            raise ConfigError(f"levels={self.levels} must be at least 2")
        if self.then_mbit < 0 or (self.then_mbit and not self.links.rate_mbit):
            raise ConfigError(f"then_mbit={self.then_mbit} must be above 0, and so must the rate of the lab's links")
        if self.swing <= 1:
            raise ConfigError(f"swing={self.swing} must be above 1")
        if self.mesh.size % self.etp or self.experts % self.ep or self.k > self.experts:
            raise ConfigError(
                f"etp={self.etp} must divide the {self.mesh.size} ranks, the {self.mesh.size}/etp groups must divide "
                f"experts={self.experts}, and k={self.k} must be at most that"
            )

    @property
    def mesh(self) -> Mesh:
        return Mesh(nodes=self.hosts, local=self.ranks)

    @property
    def ep(self) -> int:
        return self.mesh.size // self.etp

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of each rank, level by level."""
        rows = [self.least * self.swing ** (level / (self.levels - 1)) for level in range(self.levels)]
        return tuple(round(each * self.experts / self.k / self.mesh.size) for each in rows)

    def period(self) -> tuple[int, ...]:
        """The level of each step of a period."""
        up_and_down = [*range(self.levels), *range(self.levels - 2, 0, -1)]
        return tuple(level for level in up_and_down for _ in range(self.hold))

    def to_json(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ScheduleCase":
        return from_dict(cls, dict(data))
