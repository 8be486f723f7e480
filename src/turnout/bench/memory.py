"""Peak memory of a function, in a process of its own."""

import functools
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from turnout.errors import TurnoutError

MIB = 2**20


def peak_mib(function: Callable[[], object]) -> float:
    """Peak resident memory of a fresh process that calls `function`, which must be picklable, in MiB.

    What the process imports counts; its allocator and its number of threads are as torch sets them.
    Raises: TurnoutError with the process's last words if it fails or is killed.
    """
    (peak,) = _in_its_own(functools.partial(_peak_of, function))
    assert peak is not None
    return peak


@dataclass(frozen=True, kw_only=True)
class CallMemory:
    """Of a function that a fresh process makes and calls, in MiB; None where there is no Linux to ask.

    The last two leave out what the process held before: imports, weights, a batch, and the second also what a first
    call keeps, such as a workspace.
    """

    peak: float
    extra: float | None
    extra_again: float | None


def call_memory(make: Callable[[], Callable[[], object]]) -> CallMemory:
    """Peak memory of calls of what `make` gives, otherwise as `peak_mib`."""
    peak, extra, again = _in_its_own(functools.partial(_memory_of, make))
    assert peak is not None
    return CallMemory(peak=peak, extra=extra, extra_again=again)


def _peak_of(function: Callable[[], object]) -> list[float | None]:
    function()
    return [_peak_bytes() / MIB]


def _memory_of(make: Callable[[], Callable[[], object]]) -> list[float | None]:
    call = make()
    peaks, extras = [_peak_bytes()], []
    for calls in (1, 2):
        gc.collect()
        before = _forget_peak()
        for _ in range(calls):
            call()
        peaks.append(_peak_bytes())
        extras.append(None if before is None else (peaks[-1] - before) / MIB)
    return [max(peaks) / MIB, *extras]


def _in_its_own(measure: Callable[[], list[float | None]]) -> list[float | None]:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(measure, writer))
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


def _report(measure: Callable[[], list[float | None]], writer: Connection) -> None:
    try:
        found = measure()
    except Exception as error:
        writer.send(f"{type(error).__name__}: {error}")
        raise
    writer.send(found)


def _forget_peak() -> int | None:
    """Resident memory in bytes, from which on the peak is counted again; None where that cannot be asked for."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return None
    return _peak_bytes()


def _peak_bytes() -> int:
    # VmHWM, because Linux carries ru_maxrss over from the process that started this one
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
