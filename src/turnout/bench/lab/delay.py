"""A constant delay for every packet that iptables hands to a queue: `python -m turnout.bench.lab.delay MILLISECONDS`.

It stands in for `tc netem`, which not every kernel has. Packets stay in the kernel; only their numbers come here.
Source: the messages of linux/netfilter/nfnetlink_queue.h.
"""

import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_QUEUE = 0
_NETLINK_NETFILTER, _SOL_NETLINK, _NO_ENOBUFS = 12, 270, 5
_SUBSYSTEM = 3 << 8
_CONFIG, _VERDICTS = _SUBSYSTEM | 2, _SUBSYSTEM | 3
_BIND, _COPY_META, _ACCEPT, _GSO = 1, 1, 1, 4
_ERROR = 2  # type of the kernel's answer to a request
_ID_AT = 16 + 4 + 4  # headers of netlink and nfnetlink, then that of the first attribute: the packet's number
_AT_ONCE = 256
_MOST_WAITING = 65536


class DelayQueue:
    """The queue of one network namespace: every packet leaves `delay_s` after it came, in its order."""

    def __init__(self, delay_s: float) -> None:
        """Raises: OSError if this process may not have the queue."""
        self._delay_s = delay_s
        self._waiting: deque[tuple[float, int]] = deque()  # (when it is due, its number)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._configure(_attribute(1, struct.pack("!BBH", _BIND, 0, socket.AF_INET)))
        self._configure(_attribute(2, struct.pack("!IB", 0, _COPY_META)))
        self._configure(_attribute(3, struct.pack("!I", _MOST_WAITING)))
        # what the sender has not cut into packets stays whole
        self._configure(_attribute(5, struct.pack("!I", _GSO)) + _attribute(4, struct.pack("!I", _GSO)))
        self._socket.setsockopt(_SOL_NETLINK, _NO_ENOBUFS, 1)
        self._socket.setblocking(False)

    def turn(self, longest_s: float) -> None:
        """Wait for the next packet to come or to be due, and let go of all that are."""
        wait_s = longest_s if not self._waiting else self._waiting[0][0] - time.monotonic()
        if select.select([self._socket], [], [], max(0.0, min(wait_s, longest_s)))[0]:
            self._take_in()
        now, last = time.monotonic(), None
        while self._waiting and self._waiting[0][0] <= now:
            _, last = self._waiting.popleft()
        if last is not None:
            # numbers rise: one verdict for all up to this one
            self._socket.send(_message(_VERDICTS, _attribute(2, struct.pack("!II", _ACCEPT, last))))

    def _take_in(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet = self._socket.recv(4096)
            except BlockingIOError:
                return
            number = struct.unpack_from("!I", packet, _ID_AT)[0]
            self._waiting.append((time.monotonic() + self._delay_s, number))

    def _configure(self, attributes: bytes) -> None:
        self._socket.send(_message(_CONFIG, attributes, wants_answer=True))
        answer = self._socket.recv(4096)
        kind, error = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
        if kind == _ERROR and error:
            raise OSError(-error, f"the queue of packets: {os.strerror(-error)}")


def _message(kind: int, attributes: bytes, *, wants_answer: bool = False) -> bytes:
    body = struct.pack("!BBH", 0, 0, _QUEUE) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, 1 | (4 if wants_answer else 0), 0, 0) + body


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + b"\0" * (-length % 4)


def main() -> None:
    """Until SIGTERM."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # on time although the cores are busy, where that is allowed
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    queue = DelayQueue(float(sys.argv[1]) / 1e3)
    print("ready", flush=True)
    while not ended:
        queue.turn(0.5)


if __name__ == "__main__":
    main()
