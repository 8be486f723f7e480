"""What the tuner's predictions need of a machine, measured in a second: products, messages, bytes."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from turnout.comm import ExpertGroup, Lines, World
from turnout.topology import Link
from turnout.tune import Hardware

SIZE = 512  # of the matrices
SMALL, LARGE = 16, 1 << 18  # bytes to each peer
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class _Tier:
    """A network as one group of ranks finds it."""

    link: Link
    busy: float  # share of an exchange in which processors work


def hardware_name(world: World, device: torch.device) -> str:
    """Two runs of which this is equal can compare their times."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{world.size} ranks, {world.local_size} a node, {kind}{threads}"


def probe(world: World, group: ExpertGroup, device: torch.device) -> Hardware:
    """Every rank of the job calls it, and gets the same: the slowest rank's times."""
    (product_s,) = world.largest([_product_s(device)])
    tiers = {axis: _tier(group.along((axis,)), group.lines, world, device) for axis in ("local", "node")}
    whole = _tier(group.whole, group.lines, world, device)
    assert whole is not None
    # where no group lies along a tier, what lies along both stands for it
    intra, inter = tiers["local"] or whole, tiers["node"] or whole
    return Hardware(
        name=world.first(hardware_name(world, device)),
        ranks=world.size,
        local=world.local_size,
        flops_per_s=2 * SIZE**3 / product_s,
        intra=intra.link,
        inter=inter.link,
        busy=whole.busy,
    )


def _product_s(device: torch.device) -> float:
    one_NN = torch.ones(SIZE, SIZE, device=device)

    def multiply() -> None:
        torch.mm(one_NN, one_NN)

    return _best_s(multiply, device)


def _tier(wire: ProcessGroup | None, lines: Lines, world: World, device: torch.device) -> _Tier | None:
    if wire is None:
        return None
    peers = wire.size() - 1
    small_s = _best_s(lambda: _exchange(wire, lines, SMALL, device), device)
    worked_s, began_s = time.process_time(), time.perf_counter()
    large_s = _best_s(lambda: _exchange(wire, lines, LARGE, device), device)
    worked_s, took_s = time.process_time() - worked_s, time.perf_counter() - began_s
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    small_s, large_s, took_s, most_cores = world.largest([small_s, large_s, took_s, cores])
    cores_s = took_s * most_cores * max(1, world.size // world.local_size)
    (all_worked_s,) = world.total([worked_s])
    busy = min(1.0, all_worked_s / cores_s) if device.type == "cpu" else 0.0
    # a machine that something else holds up may take longer for less
    rate = peers * (LARGE - SMALL) / max(large_s - small_s, 0.1 * large_s)
    return _Tier(link=Link(bytes_per_s=rate, latency_s=small_s / peers), busy=busy)


def _exchange(wire: ProcessGroup, lines: Lines, size: int, device: torch.device) -> None:
    sent_X: Tensor = torch.zeros(wire.size() * size, dtype=torch.uint8, device=device)
    line, each = lines.of(wire), [size] * wire.size()
    if line is not None and device.type == "cpu":
        line.all_to_all(sent_X, each, each)
        return
    dist.all_to_all_single(torch.empty_like(sent_X), sent_X, group=wire)


def _best_s(work: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began_s)
    return min(times)
