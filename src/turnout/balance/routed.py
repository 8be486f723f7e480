"""What one layer routed in a step: rows from each rank to each expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from turnout.balance.dealing import turns
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Mesh

Holders = Sequence[Sequence[int]]  # [rank] -> its experts; one that several ranks have is in each of their lists


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Rows of one layer and step, forward: [source rank][expert]; a mean over steps need not be whole."""

    rows_RE: NDArray[np.float64]
    mesh: Mesh  # of the ranks that share the experts

    def __post_init__(self) -> None:
        ranks, experts = self.rows_RE.shape
        if ranks != self.mesh.size or experts < ranks or not (np.isfinite(self.rows_RE) & (self.rows_RE >= 0)).all():
            raise ConfigError(
                f"rows are [{ranks} ranks][{experts} experts]; {self.mesh.size} ranks need a row of counts of at least "
                f"{self.mesh.size} experts each, none of them negative"
            )

    @classmethod
    def alike(cls, loads_E: Sequence[float], mesh: Mesh) -> "Routed":
        """Every rank sends the same: where only the sum over ranks was recorded."""
        share_E = np.asarray(loads_E, dtype=np.float64) / mesh.size
        return cls(rows_RE=np.tile(share_E, (mesh.size, 1)), mesh=mesh)

    @property
    def num_experts(self) -> int:
        return self.rows_RE.shape[1]

    @cached_property
    def loads_E(self) -> NDArray[np.float64]:
        """Rows of each expert."""
        return self.rows_RE.sum(axis=0)

    @cached_property
    def node_R(self) -> NDArray[np.int64]:
        """The node of each rank."""
        return np.arange(self.mesh.size) // self.mesh.local

    def sent_RR(self, holders: Holders) -> NDArray[np.float64]:
        """Rows from each rank to each, dealt to copies as `dealing.py` says."""
        held: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(holders):
            for expert in experts:
                held[expert].append(rank)
        if not all(held):
            raise ConfigError(f"expert {held.index([])} lies on no rank")
        single = [expert for expert, ranks in enumerate(held) if len(ranks) == 1]
        share_ER = np.zeros((self.num_experts, self.mesh.size))
        share_ER[single, [held[expert][0] for expert in single]] = 1
        sent_RR = self.rows_RE @ share_ER
        for expert in set(range(self.num_experts)).difference(single):
            for source, turn in enumerate(turns(tuple(held[expert]), self.mesh.size, self.mesh.local)):
                # a copy may have several turns
                np.add.at(sent_RR[source], list(turn), self.rows_RE[source, expert] / len(turn))
        return sent_RR


def holders_of(placement: Placement) -> Holders:
    """The experts of each rank."""
    return [placement.experts_of(rank) for rank in range(placement.ranks)]
