"""Timing several contestants fairly: in turns, in one process, after warming up; memory in processes of their own."""

import gc
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection

import torch

from turnout.errors import TurnoutError


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one contestant over all rounds."""

    ms_min: float
    ms_median: float
    ms_max: float


def race(contestants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int) -> dict[str, Timing]:
    """Run everybody once a round, in an order that turns with the round, so that nobody always follows the same one."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warmup + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            started = time.perf_counter()
            contestants[name]()
            if number >= warmup:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: Timing(ms_min=min(ms), ms_median=statistics.median(ms), ms_max=max(ms)) for name, ms in times.items()}


def peak_mib(function: Callable[[], None]) -> float:
    """Peak resident memory of a fresh process that calls `function`, which must be picklable, in MiB.

    Raises: TurnoutError with the process's last words if it fails or is killed.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(function, writer))
    child.start()
    writer.close()
    try:
        answer = reader.recv()
    except EOFError:
        answer = "it was killed, perhaps for want of memory"
    finally:
        child.join()
    if isinstance(answer, str):
        raise TurnoutError(f"the process that measures peak memory ended with exit code {child.exitcode}: {answer}")
    return answer


def _report_peak(function: Callable[[], None], writer: Connection) -> None:
    try:
        function()
    except Exception as error:
        writer.send(f"{type(error).__name__}: {error}")
        raise
    writer.send(_peak_bytes() / 2**20)


def _peak_bytes() -> int:
    # VmHWM, because Linux carries ru_maxrss over from the process that started this one
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": len(_cores()),
        "system": platform.system(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of python, torch and the packages that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cores() -> set[int] | range:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
