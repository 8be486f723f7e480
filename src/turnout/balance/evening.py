"""Packs of experts with copies, evened out: the fullest rank is relieved by one exchange after another."""

from collections.abc import Iterator, Mapping, Sequence

Change = tuple[int, int, int]  # rank, the expert that goes there, the one that comes
ROUNDS = 200  # of exchanges; more are hardly ever needed
GAIN = 1e-9  # share of a load that is no more than rounding


def evened(packs: Sequence[Sequence[int]], loads: Sequence[float]) -> list[list[int]]:
    """Packs with as many places each, whose fullest is no fuller; of an expert's load each of its copies has a part.

    The fullest rank and another one exchange experts, or a copy of an expert elsewhere gives its place to one of the
    fullest rank's, whichever leaves least on the ranks that it changes.
    """
    packed = [list(pack) for pack in packs]
    for _ in range(ROUNDS):
        number = [0] * len(loads)
        for pack in packed:
            for expert in pack:
                number[expert] += 1
        weight = [sum(loads[expert] / number[expert] for expert in pack) for pack in packed]
        fullest = max(range(len(packed)), key=lambda rank: weight[rank])
        best = min(_ways(packed, loads, number, weight, fullest), default=None)
        if best is None or best[0] >= weight[fullest] * (1 - GAIN):
            break
        for rank, gone, come in best[1]:
            packed[rank][packed[rank].index(gone)] = come
    return packed


def _ways(
    packs: Sequence[Sequence[int]], loads: Sequence[float], number: Sequence[int], weight: Sequence[float], fullest: int
) -> Iterator[tuple[float, tuple[Change, ...]]]:
    """(most load of a rank that it changes, what it changes) of every exchange."""
    holders = {expert: [rank for rank, pack in enumerate(packs) if expert in pack] for expert in range(len(loads))}
    for rank, pack in enumerate(packs):
        for its in pack:
            for mine in packs[fullest]:
                if mine in pack:
                    continue
                if its not in packs[fullest]:
                    less = loads[mine] / number[mine] - loads[its] / number[its]
                    yield (
                        max(weight[fullest] - less, weight[rank] + less),
                        ((fullest, mine, its), (rank, its, mine)),
                    )
                if number[its] > 1:
                    added = _recounted(loads, number, holders, rank, its, mine)
                    yield max(weight[each] + more for each, more in added.items()), ((rank, its, mine),)


def _recounted(
    loads: Sequence[float],
    number: Sequence[int],
    holders: Mapping[int, Sequence[int]],
    rank: int,
    gone: int,
    come: int,
) -> dict[int, float]:
    """What each rank gets more where one copy fewer shares a load, and one more another."""
    fewer, more = loads[gone] / (number[gone] - 1), loads[come] / (number[come] + 1)
    added: dict[int, float] = {}
    for each in holders[gone]:
        added[each] = fewer - loads[gone] / number[gone]
    for each in holders[come]:
        added[each] = added.get(each, 0.0) + more - loads[come] / number[come]
    added[rank] = more - loads[gone] / number[gone]
    return added
