"""Capacities as their papers and systems write them, in plain loops over queues; nothing of the code they judge."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One choice of one token, and what may decide its place."""

    token: int
    expert: int
    choice: int
    priority: float
    draw: float  # uniform, of this entry alone
    declined: bool = False


def arrivals(entries: Sequence[Entry], priority: str) -> list[int]:
    """Indices of the entries as experts take them: first choices of all tokens, then second ones, and so on.

    Within a choice by token (Lepikhin et al. 2020, section 2.2), by the token's best score (Riquelme et al. 2021,
    section 4), or by the draw (Kim et al. 2021).
    """
    best: dict[int, float] = {}
    for entry in entries:
        best[entry.token] = max(best.get(entry.token, -math.inf), entry.priority)
    keys: dict[str, Callable[[Entry], float]] = {
        "position": lambda entry: entry.token,
        "score": lambda entry: -best[entry.token],
        "random": lambda entry: -entry.draw,
    }
    key = keys[priority]
    return sorted(range(len(entries)), key=lambda n: (entries[n].choice, key(entries[n]), entries[n].token))


def fixed(
    entries: Sequence[Entry],
    num_experts: int,
    *,
    factor: float,
    minimum: int,
    group_size: int,
    priority: str,
    least: int,
) -> list[bool]:
    """Each expert takes the first ceil(factor * choices / E) of each group of neighbouring tokens."""
    groups = [entry.token // group_size if group_size else 0 for entry in entries]
    exact = Fraction(str(factor))
    capacity = {
        group: max(minimum, least, math.ceil(exact * groups.count(group) / num_experts)) for group in set(groups)
    }
    taken: dict[tuple[int, int], int] = {}
    keep = [False] * len(entries)
    for n in arrivals(entries, priority):
        queue = (groups[n], entries[n].expert)
        keep[n] = taken.get(queue, 0) < capacity[groups[n]]
        taken[queue] = taken.get(queue, 0) + 1
    return keep


def tutel(
    entries: Sequence[Entry],
    num_experts: int,
    *,
    factor: float,
    alignment: int,
    priority: str,
    least: int,
) -> list[bool]:
    """Tutel's x: above 0, k * int(x * ceil(T / E)) rows; 0, all; below 0, what is needed, at most as -x.

    Hwang et al. 2022, section 4.1, and extract_critical of its code (specs/tutel.md, section 2.6). Where tokens differ
    in their choices k is their mean, over those that have any, and the product is rounded up: ours.
    """
    if factor == 0:
        return [True] * len(entries)
    tokens = {entry.token for entry in entries}
    rows = int(abs(factor) * math.ceil(len(tokens) / num_experts))
    capacity = max(math.ceil(Fraction(len(entries) * rows, max(len(tokens), 1))), least)
    needed = max((sum(entry.expert == e for entry in entries) for e in range(num_experts)), default=0)
    if factor < 0:
        capacity = min(capacity, needed)
    while capacity % alignment:
        capacity += 1
    taken, keep = [0] * num_experts, [False] * len(entries)
    for n in arrivals(entries, priority):
        keep[n] = taken[entries[n].expert] < capacity
        taken[entries[n].expert] += 1
    return keep


def affinity(
    entries: Sequence[Entry], num_experts: int, *, threshold: float, minimum: int, factor: float, least: int
) -> list[bool]:
    """Each expert keeps the fewest of its best that carry the threshold of its affinity, within the bounds.

    Li et al. 2024, arXiv:2406.00023, section on the adaptive threshold; the reading of specs/locmoe.md.
    """
    minimum = max(minimum, least)
    most = math.inf
    if factor:
        most = max(minimum, math.ceil(Fraction(str(factor)) * len(entries) / num_experts))
    keep = [False] * len(entries)
    arrival = arrivals(entries, "position")
    for e in range(num_experts):
        own = [n for n in arrival if entries[n].expert == e]
        own.sort(key=lambda n: -entries[n].priority)
        whole, carried = sum(max(entries[n].priority, 0.0) for n in own), 0.0
        for place, n in enumerate(own):
            if place >= most or (place >= minimum and carried >= threshold * whole * (1 - 1e-9)):
                break
            keep[n] = True
            carried += max(entries[n].priority, 0.0)
    return keep
