"""A placement that costs little, by local search: experts change places with others, or move where there is room.

It starts from where experts lie, from EPLB's placement, from neighbours in order and from a greedy one, and takes the
best it reaches: never worse than any of them by the cost of `cost.py`. Nothing is drawn at random.

The cost is made of largest numbers over ranks, so most exchanges change nothing. Among those the better one is by a
second number, in which the largest are replaced by root mean squares, which every exchange changes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnout.balance.cost import TRIPS, Prices
from turnout.balance.eplb import eplb
from turnout.balance.routed import Routed
from turnout.errors import ConfigError
from turnout.placement import Placement

# what is added up of each rank: rows it computes; rows that come from other nodes, and from its own; rows that go
# there; experts that leave for other nodes, or come from there; the same inside the node
LOAD, FAR_IN, NEAR_IN, FAR_OUT, NEAR_OUT, FAR_LEAVE, FAR_COME, NEAR_LEAVE, NEAR_COME = range(9)
FAR = [FAR_IN, FAR_OUT, FAR_LEAVE, FAR_COME]
Sums = NDArray[np.float64]  # [..., 9, ranks]
GAIN = 1e-9  # share of a number that is no more than rounding
MOST_TRIED = 96  # experts that are tried in a round: of more, those that the slowest ranks wait for


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the search must keep."""

    room: int = 0  # most experts of a rank; 0: as many as lie on the fullest rank where they lie evenly
    rounds: int = 200  # of exchanges; more are hardly ever needed

    def __post_init__(self) -> None:
        for name in ("room", "rounds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"balance.{name}={getattr(self, name)} must be at least 0")


def balanced(
    routed: Routed, prices: Prices, present: Placement | None = None, limits: Limits | None = None
) -> Placement:
    """The placement of least cost that the search finds.

    Raises: ConfigError if the experts have no room, or `present` is of other experts or ranks.
    """
    search, ranks = _Search(routed, prices, present, limits or Limits()), routed.mesh.size
    starts = [Placement.even(routed.num_experts, ranks).rank_of, _rank_of(eplb(list(routed.loads_E), routed.mesh))]
    if present is not None and search.has_room(present):
        starts.insert(0, present.rank_of)
    found = [search.improved(np.array(start)) for start in starts]
    found.append(search.improved(search.greedy()))
    # the first of equals: where experts lie
    best = min(found, key=lambda rank_E: search.value(search.sums(rank_E))[0])
    return Placement.of([int(rank) for rank in best], ranks)


def _rank_of(packs: Iterable[Iterable[int]]) -> list[int]:
    at = {expert: rank for rank, experts in enumerate(packs) for expert in experts}
    return [at[expert] for expert in sorted(at)]


class _Search:
    def __init__(self, routed: Routed, prices: Prices, present: Placement | None, limits: Limits) -> None:
        ranks, experts = routed.mesh.size, routed.num_experts
        self._room, self._rounds = limits.room or -(-experts // ranks), limits.rounds
        if self._room * ranks < experts:
            raise ConfigError(
                f"balance.room={self._room} on {ranks} ranks holds {self._room * ranks} of {experts} experts; nearest "
                f"legal: {-(-experts // ranks)}"
            )
        if present is not None and (present.num_experts, present.ranks) != (experts, ranks):
            raise ConfigError(
                f"the present placement has {present.num_experts} experts on {present.ranks} ranks; {experts} on "
                f"{ranks} were routed to"
            )
        self._prices, self._ranks, self._experts = prices, ranks, np.arange(experts)
        self._local = routed.mesh.local
        self._rows_ER, self._loads_E, self._node_R = (
            np.ascontiguousarray(routed.rows_RE.T),
            routed.loads_E,
            routed.node_R,
        )
        self._by_node_EN = np.add.reduceat(self._rows_ER, np.arange(0, ranks, routed.mesh.local), axis=1)
        self._present_E = None if present is None else np.array(present.rank_of)

    def has_room(self, placement: Placement) -> bool:
        """Whether no rank holds more experts than it may."""
        return max(len(placement.slots_of(rank)) for rank in range(placement.ranks)) <= self._room

    def value(self, sums: Sums) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The cost of each, and the number that tells equal ones apart."""
        if self._prices.shares_card:
            sums = sums.copy()
            by_card = sums[..., FAR, :].reshape(*sums.shape[:-2], len(FAR), -1, self._local)
            sums[..., FAR, :] = by_card.mean(axis=-1).repeat(self._local, axis=-1)
        return self._seconds(sums.max(axis=-1)), self._seconds(np.sqrt(np.square(sums).mean(axis=-1)))

    def sums(self, rank_E: NDArray[np.int64]) -> Sums:
        """Of a whole placement."""
        return self._of(self._experts, rank_E).sum(axis=0)

    def greedy(self) -> NDArray[np.int64]:
        """The heaviest first, each where all that lie so far cost least."""
        rank_E, held_R = np.zeros(len(self._experts), dtype=np.int64), np.zeros(self._ranks, dtype=np.int64)
        total, every = np.zeros((9, self._ranks)), np.arange(self._ranks)
        for place, expert in enumerate(np.argsort(-self._loads_E, kind="stable")):
            # the last ones must not leave a rank without any
            empty, left = held_R == 0, len(self._experts) - place
            open_R = np.flatnonzero(empty if empty.sum() >= left else held_R < self._room)
            tried = total + self._of(np.full(len(open_R), expert), every[open_R])
            best = _best(*self.value(tried))
            rank_E[expert], total = open_R[best], tried[best]
            held_R[open_R[best]] += 1
        return rank_E

    def improved(self, rank_E: NDArray[np.int64]) -> NDArray[np.int64]:
        """What exchanges make of a placement, one after another, each the best there is of an expert."""
        held_R = np.bincount(rank_E, minlength=self._ranks)
        total = self.sums(rank_E)
        now = self.value(total)
        for _ in range(self._rounds):
            before = now
            for expert in self._tried(rank_E, total):
                changed = self._changed(int(expert), rank_E, held_R, total)
                if changed is None:
                    continue
                sums = self.sums(changed)
                value = self.value(sums)
                if _is_less(value, now):
                    rank_E, total, now = changed, sums, value
                    held_R = np.bincount(rank_E, minlength=self._ranks)
            if not _is_less(now, before):
                break
        return rank_E

    def _changed(
        self, expert: int, rank_E: NDArray[np.int64], held_R: NDArray[np.int64], total: Sums
    ) -> NDArray[np.int64] | None:
        """The placement after the best exchange of one expert; None where it can go nowhere."""
        here = rank_E[expert]
        others = np.flatnonzero(rank_E != here)
        without = total - self._of(np.array([expert]), np.array([here]))[0]
        there = rank_E[others]
        options = [
            without
            + self._of(np.full(len(others), expert), there)
            - self._of(others, there)
            + self._of(others, np.full(len(others), here))
        ]
        open_R = np.flatnonzero((held_R < self._room) & (np.arange(self._ranks) != here) & (held_R[here] > 1))
        options.append(without + self._of(np.full(len(open_R), expert), open_R))
        tried = np.concatenate(options)
        if not len(tried):
            return None
        best = _best(*self.value(tried))
        changed = rank_E.copy()
        if best < len(others):
            changed[expert], changed[others[best]] = there[best], here
        else:
            changed[expert] = open_R[best - len(others)]
        return changed

    def _tried(self, rank_E: NDArray[np.int64], total: Sums) -> Iterator[np.int64]:
        """The experts to try in a round: all, or of many those that touch what is waited for, the heaviest first."""
        order = np.argsort(-self._loads_E, kind="stable")
        if len(order) <= MOST_TRIED:
            yield from order
            return
        slowest = {int(total[what].argmax()) for what in (LOAD, FAR_IN, NEAR_IN)}
        from_slowest_E = self._rows_ER[:, int(total[FAR_OUT].argmax())]
        senders = np.argsort(-from_slowest_E, kind="stable")[: MOST_TRIED // 4]
        wanted = {int(e) for e in order if int(rank_E[e]) in slowest} | {int(e) for e in senders}
        yield from [e for e in order if int(e) in wanted][:MOST_TRIED]

    def _of(self, experts: NDArray[np.int64], rank_E: NDArray[np.int64]) -> Sums:
        """What each of some experts adds on the rank given for it. Shapes: returns (experts, 9, ranks)."""
        found, each = np.zeros((len(experts), 9, self._ranks)), np.arange(len(experts))
        node = self._node_R[rank_E]
        loads, own, rows_ER = self._loads_E[experts], self._by_node_EN[experts, node], self._rows_ER[experts]
        found[each, LOAD, rank_E] = loads
        found[each, FAR_IN, rank_E] = loads - own
        found[each, NEAR_IN, rank_E] = own - rows_ER[each, rank_E]
        is_far = self._node_R[None, :] != node[:, None]
        found[:, FAR_OUT] = rows_ER * is_far
        found[:, NEAR_OUT] = rows_ER * ~is_far
        found[each, NEAR_OUT, rank_E] = 0
        if self._present_E is not None:
            was = self._present_E[experts]
            leaves_node = self._node_R[was] != node
            found[each, FAR_LEAVE, was] = found[each, FAR_COME, rank_E] = leaves_node
            found[each, NEAR_LEAVE, was] = found[each, NEAR_COME, rank_E] = ~leaves_node & (was != rank_E)
        return found

    def _seconds(self, of_R: NDArray[np.float64]) -> NDArray[np.float64]:
        """The cost, from one number over ranks of each kind. Shapes: of_R (..., 9)."""
        prices = self._prices
        far = np.maximum(of_R[..., FAR_IN], of_R[..., FAR_OUT])
        near = np.maximum(of_R[..., NEAR_IN], of_R[..., NEAR_OUT])
        far_moved = np.maximum(of_R[..., FAR_LEAVE], of_R[..., FAR_COME])
        near_moved = np.maximum(of_R[..., NEAR_LEAVE], of_R[..., NEAR_COME])
        exchange_s = TRIPS * prices.slowest_s(far, near, prices.row_bytes)
        move_s = prices.slowest_s(far_moved, near_moved, prices.expert_bytes)
        return prices.row_s * of_R[..., LOAD] + exchange_s + move_s / prices.period


def _best(cost: NDArray[np.float64], second: NDArray[np.float64]) -> int:
    """The first of those that cost least, by the second number."""
    least = cost <= cost.min() * (1 + GAIN)
    return int(np.where(least, second, np.inf).argmin())


def _is_less(one: tuple[NDArray[np.float64], NDArray[np.float64]], other: tuple[NDArray[np.float64], ...]) -> bool:
    """Whether it costs less by more than rounding, or no more and the second number is less."""
    if one[0] < other[0] * (1 - GAIN):
        return True
    return bool(one[0] <= other[0] and one[1] < other[1] * (1 - GAIN))
