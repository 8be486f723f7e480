"""Chunks on their way to the experts and back while others compute: the order in which hosts begin and await.

A way is a generator: it begins an exchange, yields, and waits for it when it is resumed. With exchanges S (to the
experts) and K (back) of one leg each, and chunks 0, 1, 2, the order is

    begin S0 S1 S2 | end S0, compute 0, begin K0 | end S1, compute 1, begin K1 | end S2, ... | end K0 K1 K2

so that a link that has nothing to do never waits for a host: what one chunk needs is on its way while others compute,
and an exchange that only begins to shake hands lies behind one that sends. Nothing that is on its way home is awaited
before the last chunk is computed. Read backwards, begins and ends changed for each other, it is the same order:
autograd, which takes the last node first, runs the same pipeline in reverse. Of an exchange of several legs the last
ones are begun as many chunks ahead.
Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, section 4.2, which has one exchange of each kind on its way.
"""

from collections.abc import Callable, Generator, Iterable
from typing import Generic, TypeVar

Rows = TypeVar("Rows")
Home = TypeVar("Home")
Value = TypeVar("Value")
Way = Generator[None, None, Value]


def pipelined(there: Iterable[Way[Rows]], compute_and_return: Callable[[Rows], Way[Home]]) -> list[Home]:
    """What each chunk brings home. `compute_and_return` computes when it is called, and gives the way back.

    All ways have the same number of legs.
    """
    coming, going = [_Journey(way) for way in there], list[_Journey[Home]]()
    turn = 0
    while len(going) < len(coming):
        # the newest first: its next leg is on its way while an older one's last is awaited
        for each in reversed(coming[len(going) : turn + 1]):
            each.on()
        turn += 1
        next_one = coming[len(going)]
        if next_one.arrived:
            going.append(_Journey(compute_and_return(next_one.brought)))
            _to_last_leg(going[:-1], next_one.legs)
    while any(each.legs < coming[0].legs for each in going):
        _to_last_leg(going, coming[0].legs)
    for each in going:
        each.on()
    return [each.brought for each in going]


def _to_last_leg(going: "list[_Journey[Home]]", legs: int) -> None:
    """Everybody who has not begun the last leg one leg on."""
    for each in reversed(going):
        if each.legs < legs:
            each.on()


class _Journey(Generic[Value]):
    """A way, its first leg begun."""

    def __init__(self, way: Way[Value]) -> None:
        self._way, self._brought = way, list[Value]()
        self.legs = 0  # begun
        self.on()

    @property
    def arrived(self) -> bool:
        return bool(self._brought)

    @property
    def brought(self) -> Value:
        """What it brought; it has arrived."""
        return self._brought[0]

    def on(self) -> None:
        """Wait for the leg that was begun and begin the next one, if there is one."""
        if self.arrived:
            return
        try:
            next(self._way)
            self.legs += 1
        except StopIteration as end:
            self._brought.append(end.value)
