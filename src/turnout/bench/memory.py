"""Peak memory of a function, in a process of its own."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

from turnout.errors import TurnoutError


def peak_mib(function: Callable[[], None]) -> float:
    """Peak resident memory of a fresh process that calls `function`, which must be picklable, in MiB.

    What the process imports counts; its allocator and its number of threads are as torch sets them.
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
