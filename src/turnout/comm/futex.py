"""Waiting for a number in memory that processes share, in the kernel's queue: who waits leaves the core to others.

Source: futex(2). It is not the private kind: the queue belongs to the page, whoever maps it.
"""

import ctypes
import platform
import sys
from functools import cache
from typing import Any

_NUMBER = 202  # of the system call, on x86_64
_WAIT, _WAKE, _ALL = 0, 1, 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def is_here() -> bool:
    """Whether this machine has it under the number that is used here."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def wait(address: int, seen: int, timeout_s: float) -> None:
    """Until somebody wakes who wait at `address`, at most so long; at once if the 32 bits there are not `seen`."""
    whole = int(timeout_s)
    limit = _Timespec(whole, int(1e9 * (timeout_s - whole)))
    _call()(_NUMBER, address, _WAIT, seen & 0xFFFFFFFF, ctypes.byref(limit), None, 0)


def wake(address: int) -> None:
    """All who wait there, after the number was changed."""
    _call()(_NUMBER, address, _WAKE, _ALL, None, None, 0)


@cache
def _call() -> Any:
    call = ctypes.CDLL(None).syscall
    pointer, word = ctypes.c_void_p, ctypes.c_uint
    call.argtypes = (ctypes.c_long, pointer, ctypes.c_int, word, pointer, pointer, word)
    call.restype = ctypes.c_long
    return call
