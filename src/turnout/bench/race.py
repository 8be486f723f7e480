"""Timing several contestants fairly: in turns, in one process, after warming up; compared round by round."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one contestant, round by round; rounds of warming up are not among them."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Time of one contestant over another's in the same round: the median over rounds, and the quartiles around it."""

    median: float
    low: float
    high: float


def race(contestants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int) -> dict[str, Timing]:
    """Run everybody once a round, `warmup` rounds and then `rounds` that are timed.

    The order is drawn anew each round, and the same in every race: nobody keeps the same one before it, whose memory
    it finds in the caches.
    """
    ms: dict[str, list[float]] = {name: [] for name in contestants}
    # what is there by now stays: no collection has to walk through it again
    gc.collect()
    gc.freeze()
    try:
        for number in range(warmup + rounds):
            for name in random.Random(number).sample(sorted(contestants), len(contestants)):
                elapsed_ms = _timed(contestants[name])
                if number >= warmup:
                    ms[name].append(elapsed_ms)
    finally:
        gc.unfreeze()
    return {name: Timing(ms=tuple(times)) for name, times in ms.items()}


def ratio(of: Timing, to: Timing) -> Ratio:
    """How much longer `of` took than `to`. A machine that slows down slows both of a round, so their ratio stays."""
    each = [one / other for one, other in zip(of.ms, to.ms, strict=True)]
    # quartiles need two rounds
    low, median, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return Ratio(median=median, low=low, high=high)


def _timed(step: Callable[[], object]) -> float:
    # nobody pays for the garbage of the one before
    gc.collect()
    started = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - started)
