"""What the kernel says this process received: TCP_INFO of its own sockets, by connection. Linux; no tools, no root."""

import os
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

Connection = tuple[str, int, str, int]  # own address and port, then the peer's
# tcpi_bytes_received of struct tcp_info, an unsigned 64-bit number: linux/tcp.h
_TCP_INFO, _OFFSET, _SIZE = 11, 128, 8
# what gloo adds to a message: three headers of 48 bytes, of which one goes the other way; all-to-alls go both ways
GLOO_BYTES = 144


def is_available() -> bool:
    return sys.platform.startswith("linux")


def received() -> dict[Connection, int]:
    """Bytes received on each TCP connection of this process, the network's own headers left out."""
    return dict(_connections())


def matrix(deltas: Sequence[Mapping[Connection, int]]) -> dict[tuple[int, int], int]:
    """(sender, receiver) -> bytes, of what each rank received; connections to others than ranks are left out."""
    owner = {connection: rank for rank, mine in enumerate(deltas) for connection in mine}
    total: dict[tuple[int, int], int] = defaultdict(int)
    for receiver, mine in enumerate(deltas):
        for (host, port, peer_host, peer_port), size in mine.items():
            sender = owner.get((peer_host, peer_port, host, port))
            if sender is not None and sender != receiver:
                total[sender, receiver] += size
    return dict(total)


def _connections() -> Iterator[tuple[Connection, int]]:
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as each:
                if each.type != socket.SOCK_STREAM or each.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = each.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
                ends = (*each.getsockname()[:2], *each.getpeername()[:2])
        except OSError:
            # closed meanwhile, or listening
            continue
        yield ends, int.from_bytes(info[_OFFSET : _OFFSET + _SIZE], sys.byteorder)
