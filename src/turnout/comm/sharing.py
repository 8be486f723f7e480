"""Tutel's r: in how many parts an expert computes, from slices that always lie on the same ranks.

Each of the g ranks of an expert keeps one of g slices of its hidden width. With r in divisors of g they are r parts of
g / r neighbours: those gather their slices, so that each computes with 1 / r of the width, and rows go to one rank of
every part. r = g gathers no weights, r = 1 shares no rows, and r = 0 gathers the experts of all ranks, so that tokens
stay. For every r the same slices lie on the same ranks, and tokens come in and go out alike: to change r moves nothing.
Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, section 4.1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed import ProcessGroup

from turnout.strategy import legal_parts

Maker = Callable[[Sequence[Sequence[int]]], ProcessGroup | None]


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Ranks of an expert group that share something, this one among them."""

    places: tuple[int, ...]  # in the whole group, in order
    at: int  # which of them this process is
    wire: ProcessGroup

    @property
    def place(self) -> int:
        """This process's, in the whole group."""
        return self.places[self.at]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Whom this rank shares rows and weights with under one r."""

    rows: Peers | None  # who has the other parts of its experts; None: it computes whole ones
    weights: Peers | None  # whose slices it gathers; None: it computes with its own


def sharings(blocks: Sequence[Sequence[int]], etp: int, place: int, world: int, group: Maker) -> Mapping[int, Sharing]:
    """Every r that `etp` slices allow; `group` makes the process groups of such lists, and returns this rank's.

    `blocks`: the ranks that share experts, all of them, this one at `place`; the slices of an expert are neighbours.
    """
    ranks = range(world)
    found = {0: Sharing(rows=None, weights=_peers(range(len(blocks[0])), place, group(blocks)))}
    first, at = place - place % etp, place % etp
    for parts in legal_parts(etp)[1:]:
        width = etp // parts
        part, member = divmod(at, width)
        across = group([ranks[start + one : start + etp : width] for start in ranks[::etp] for one in range(width)])
        within = group([ranks[start : start + width] for start in ranks[::width]])
        found[parts] = Sharing(
            rows=_peers(range(first + member, first + etp, width), place, across),
            weights=_peers(range(first + part * width, first + (part + 1) * width), place, within),
        )
    return found


def _peers(places: Sequence[int], place: int, wire: ProcessGroup | None) -> Peers | None:
    return None if wire is None else Peers(places=tuple(places), at=places.index(place), wire=wire)
