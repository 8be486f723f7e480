"""Contestants in turns on several ranks: everybody begins at one moment, and is done when the last rank is."""

import gc
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from turnout.comm import World

Work = Callable[[], object]
_READY_S = 2e-3  # from the word to start to the start


def in_turns(
    contestants: Mapping[str, Work],
    world: World,
    quiet: ProcessGroup,
    *,
    rounds: int,
    warmup: int,
    repeat: int = 1,
    delay_ms: float = 0.0,
) -> dict[str, list[float]]:
    """For each, round by round, the seconds from the common start until this rank was done, of `repeat` the mean.

    The order is drawn anew each round, alike on all ranks. `quiet`: a group for what is not measured; `delay_ms`: how
    long a message takes between two of them.
    """
    ends: dict[str, list[float]] = defaultdict(list)
    gc.collect()
    gc.freeze()
    gc.disable()
    for number in range(warmup + rounds):
        for name in random.Random(number).sample(sorted(contestants), len(contestants)):
            start_s = common_start(world, quiet, delay_ms)
            for _ in range(repeat):
                contestants[name]()
            elapsed_s = (time.perf_counter() - start_s) / repeat
            if number >= warmup:
                ends[name].append(elapsed_s)
    return dict(ends)


def common_start(world: World, quiet: ProcessGroup, delay_ms: float) -> float:
    """Wait until the moment that the first rank names once all are here: the clock is that of the whole machine."""
    dist.barrier(group=quiet)
    ready_s = _READY_S + 2e-4 * world.size + 4e-3 * delay_ms
    start = torch.tensor([time.perf_counter() + ready_s if world.is_first else 0.0], dtype=torch.float64)
    dist.broadcast(start, src=0, group=quiet)
    start_s = float(start)
    time.sleep(max(0.0, start_s - time.perf_counter()))
    return start_s


def of_slowest(ends: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Of every round what it took the last rank."""
    return {name: [max(of_round) for of_round in zip(*(each[name] for each in ends), strict=True)] for name in ends[0]}
