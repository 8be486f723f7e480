"""Chunks on their way to the experts and back while others compute: the order in which hosts begin and await.

A way is a generator: it begins an exchange, yields, and waits for it when it is resumed. With exchanges S (to the
experts) and K (back) of one leg each, and chunks 0, 1, 2, the order is

    begin S0 | end S0, begin S1, compute 0, begin K0 | end S1, begin S2, compute 1, end K0, begin K1 | end S2, ...

so that while chunk i computes, the first exchange of chunk i + 1 and the second of chunk i - 1 are on their way. Read
backwards, begins and ends changed for each other, it is the same order: autograd, which takes the last node first, runs
the same pipeline in reverse. An exchange of several legs is begun as many chunks ahead.
Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, section 4.2.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Rows = TypeVar("Rows")
Home = TypeVar("Home")
Way = Generator[None, None, Rows]


def pipelined(there: Iterable[Way[Rows]], compute_and_return: Callable[[Rows], Way[Home]]) -> list[Home]:
    """What each chunk brings home. `compute_and_return` computes when it is called, and gives the way back.

    All ways of one kind have the same number of legs.
    """
    waiting, coming, going = deque(there), deque[Way[Rows]](), deque[Way[Home]]()
    home: list[Home] = []
    while waiting or coming or going:
        if waiting:
            coming.append(waiting.popleft())
        going.extend([compute_and_return(rows) for rows in _further(coming)])
        home.extend(_further(going))
    return home


def _further(ways: deque[Way[Rows]]) -> list[Rows]:
    """Every way one leg on, the oldest first; what those that have ended brought."""
    ended, still = [], []
    for way in ways:
        try:
            next(way)
            still.append(way)
        except StopIteration as end:
            ended.append(end.value)
    ways.clear()
    ways.extend(still)
    return ended
