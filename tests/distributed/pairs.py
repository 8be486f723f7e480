"""A set of cases in which every two values of two settings meet, where any legal case has both.

Source of the idea: Cohen et al. 1997, "The AETG system", IEEE Transactions on Software Engineering 23(7): each case is
the best of a few that were drawn.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

Values = Mapping[str, Sequence[str]]  # of each setting, by names
Drawn = dict[str, str]  # setting -> the name of its value
Pair = frozenset[tuple[str, str]]

_TRIES, _DRAWS = 300, 12  # for one legal case; of legal cases that are compared


def all_pairs(values: Values) -> list[Pair]:
    """Every two values of two settings, in order."""
    named = [[(name, value) for value in own] for name, own in values.items()]
    return [frozenset((one, other)) for a, b in combinations(named, 2) for one in a for other in b]


def pairs_of(drawn: Drawn) -> set[Pair]:
    """Those that meet in a case."""
    return {frozenset(pair) for pair in combinations(drawn.items(), 2)}


def crossed(values: Values, is_legal: Callable[[Drawn], bool]) -> Iterator[Drawn]:
    """Cases until every pair was there or none of many draws with it was legal; those first that bring most.

    The same ones in every process and run.
    """
    draw, left = random.Random(0), dict.fromkeys(all_pairs(values))
    while left:
        pair = next(iter(left))
        del left[pair]
        first = _drawn(values, dict(pair), is_legal, draw)
        if first is None:
            continue
        others = [_drawn(values, dict(pair), is_legal, draw) for _ in range(_DRAWS - 1)]
        found = [first, *(case for case in others if case)]
        best = max(found, key=lambda case: sum(each in left for each in pairs_of(case)))
        for each in pairs_of(best):
            left.pop(each, None)
        yield best


def _drawn(values: Values, fixed: Drawn, is_legal: Callable[[Drawn], bool], draw: random.Random) -> Drawn | None:
    """A legal case with the fixed values; None: there was none in so many tries."""
    for _ in range(_TRIES):
        case = {name: fixed.get(name) or draw.choice(own) for name, own in values.items()}
        if is_legal(case):
            return case
    return None
