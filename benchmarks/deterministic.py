"""What torch's deterministic mode costs a layer, and whether ten runs in it are equal bit for bit.

Usage: python -m benchmarks.deterministic [--shapes a,b,c] [--modes forward,train] [--rounds 8] [--threads 2] > FILE

The kernels add in one order whatever the threads do, so nothing is computed otherwise in that mode; but torch then also
fills all memory it hands out uninitialised (`fills`, torch's own default there). `plain` leaves that off. Both take
turns with the mode switched off, round by round; `equal_runs` counts runs whose output, or gradients too, are those of
the first.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from turnout.bench.layer import SHAPES
from turnout.bench.layer_peers import OURS, forward_of
from turnout.bench.race import race, ratio
from turnout.bench.run import result

RUNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="a,b,c")
    parser.add_argument("--modes", default="forward,train")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for shape in asked.shapes.split(","):
        for mode in asked.modes.split(","):
            rows.append(measure(shape, train=mode == "train", rounds=asked.rounds))
            print(rows[-1], file=sys.stderr)
    json.dump(result(rows), sys.stdout, indent=1)
    print()


def measure(shape: str, *, train: bool, rounds: int) -> dict[str, Any]:
    """One layer by `fused_cpu` with its router, in the three ways in turns."""
    step = layer_step(shape, train=train)

    def way(on: bool, fill: bool) -> None:
        with mode(on=on, fill=fill):
            step()

    calls: dict[str, Callable[[], object]] = {
        "off": partial(way, on=False, fill=False),
        "plain": partial(way, on=True, fill=False),
        "fills": partial(way, on=True, fill=True),
    }
    timings = race(calls, rounds=rounds, warmup=2)
    with mode(on=True, fill=True):
        first = step()
        same = [all(map(torch.equal, first, step())) for _ in range(RUNS - 1)]
    cost = {name: ratio(timings[name], timings["off"]) for name in ("plain", "fills")}
    return {
        "shape": shape,
        "mode": "train" if train else "forward",
        "threads": torch.get_num_threads(),
        "ms_median": {name: timing.median for name, timing in timings.items()},
        "of_off": {name: found.median for name, found in cost.items()},
        "of_off_quartiles": {name: [found.low, found.high] for name, found in cost.items()},
        "runs": RUNS,
        "equal_runs": 1 + sum(same),
    }


def layer_step(shape: str, *, train: bool) -> Callable[[], list[Tensor]]:
    """Output of a layer on a fixed batch, and all its gradients when it trains."""
    sizes = SHAPES[shape]
    forward, parameters = forward_of(f"{OURS}fused_cpu", sizes, None, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x_TD, y_grad_TD = (torch.randn(sizes.tokens, sizes.dim, generator=generator) for _ in range(2))
    x_TD.requires_grad_(train)

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(train):
            y_TD = forward(x_TD)
        return [y_TD, *torch.autograd.grad(y_TD, [x_TD, *parameters], y_grad_TD)] if train else [y_TD]

    return step


@contextmanager
def mode(*, on: bool, fill: bool) -> Iterator[None]:
    """Within it torch is deterministic, or not, and fills what it allocates, or not."""
    was_on, filled = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        deterministic.fill_uninitialized_memory = filled


if __name__ == "__main__":
    main()
