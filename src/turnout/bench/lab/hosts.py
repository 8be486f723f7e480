"""Hosts and their links: one network namespace a host, one full-duplex card each, one switch between them."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from turnout.errors import ConfigError

_CLONE_NEWNET = 0x40000000
_SUBNET = "10.77.0"
_MOST_HOSTS = 250  # last bytes of their addresses
# a card holds so many milliseconds of traffic, then drops
_QUEUE_MS = 200
_BURST_S = 0.002  # what may go out at once
_SETTINGS = (
    # others cost rights in a namespace, or take the queue for the link's rate
    ("net/ipv4/tcp_congestion_control", "reno"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    # rounds of a benchmark follow each other after pauses and on old connections
    ("net/ipv4/tcp_slow_start_after_idle", "0"),
    ("net/ipv4/tcp_no_metrics_save", "1"),
)


@dataclass(frozen=True, kw_only=True)
class Links:
    """The card of every host."""

    rate_mbit: float = 0.0  # each way; 0: as fast as the machine copies
    packet_us: float = 0.0  # a packet occupies the card so much longer: LogP's gap, the message rate of a card
    delay_ms: float = 0.0  # one way between two hosts
    mtu: int = 9000  # bytes of a packet

    def __post_init__(self) -> None:
        for name in ("rate_mbit", "packet_us", "delay_ms"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")
        if self.packet_us and not self.rate_mbit:
            raise ConfigError(f"packet_us={self.packet_us} needs a rate, as rate_mbit=400; nearest legal without: 0")
        if not 576 <= self.mtu <= 65535:
            raise ConfigError(f"mtu={self.mtu} must be in 576..65535")

    @property
    def bytes_per_s(self) -> float:
        """Of a card, each way; only where there is a rate."""
        return self.rate_mbit * 1e6 / 8

    @property
    def overhead_bytes(self) -> int:
        """What a packet counts more than it has: as many bytes as the card sends in `packet_us`."""
        return round(self.packet_us * 1e-6 * self.bytes_per_s)

    @property
    def burst_bytes(self) -> int:
        """What a card that was idle sends at once."""
        return round(max(32 * 1024, _BURST_S * self.bytes_per_s, 4 * (self.mtu + self.overhead_bytes)))


class Lab:
    """Context in which the hosts exist. Run it in a process started by `isolated`: then even kill -9 leaves nothing."""

    def __init__(self, hosts: int, links: Links) -> None:
        """Raises: ConfigError for a number of hosts that has no addresses."""
        if not 1 <= hosts <= _MOST_HOSTS:
            raise ConfigError(f"hosts={hosts} must be in 1..{_MOST_HOSTS}")
        self.hosts, self.links = hosts, links
        self._tag = f"lab{os.getpid()}"
        self._stack = ExitStack()

    def namespace(self, host: int) -> str:
        return f"{self._tag}-{host}"

    def address(self, host: int) -> str:
        return f"{_SUBNET}.{host + 1}"

    def enter(self, host: int) -> None:
        """From here on the calling thread, and what it starts, is on that host."""
        descriptor = os.open(f"/run/netns/{self.namespace(host)}", os.O_RDONLY)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(descriptor, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace(host)}")
        finally:
            os.close(descriptor)

    def cut(self, host: int) -> None:
        """The host's cable is out, at the switch: its own card does not notice."""
        _ip(self._switch, [f"link set {_port(host)} down"])

    def mend(self, host: int) -> None:
        """The cable is in again."""
        _ip(self._switch, [f"link set {_port(host)} up"])

    def pace(self, rate_mbit: float) -> None:
        """From here on every card sends at that rate, each way.

        Raises: ConfigError in a lab whose cards have no rate, or for none.
        """
        if not self.links.rate_mbit or rate_mbit <= 0:
            raise ConfigError(f"rate_mbit={rate_mbit} must be above 0, and so must that of the lab's links")
        self.links = replace(self.links, rate_mbit=rate_mbit)
        for host in range(self.hosts):
            self._shape(self.namespace(host), "eth0")
            self._shape(self._switch, _port(host))

    def __enter__(self) -> "Lab":
        with ExitStack() as undo:
            _add_namespace(self._switch, undo)
            _ip(self._switch, ["link add br0 type bridge forward_delay 0 mcast_snooping 0", "link set br0 up"])
            for host in range(self.hosts):
                self._add(host, undo)
            if self.links.delay_ms:
                self._delay(undo)
            self._stack = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def _switch(self) -> str:
        return f"{self._tag}-switch"

    def _add(self, host: int, undo: ExitStack) -> None:
        name, port, mtu = self.namespace(host), _port(host), self.links.mtu
        _add_namespace(name, undo)
        ends = f"{port} mtu {mtu} type veth peer name eth0 mtu {mtu} address {_mac(host)} netns {name}"
        _ip(self._switch, [f"link add {ends}", f"link set {port} master br0", f"link set {port} up"])
        others = [other for other in range(self.hosts) if other != host]
        known = [f"neigh replace {self.address(at)} lladdr {_mac(at)} nud permanent dev eth0" for at in others]
        _ip(name, ["link set lo up", f"addr add {self.address(host)}/24 dev eth0", "link set eth0 up", *known])
        _write(name, _SETTINGS)
        if self.links.rate_mbit:
            for namespace, device in ((name, "eth0"), (self._switch, port)):
                self._shape(namespace, device)

    def _shape(self, namespace: str, device: str) -> None:
        """A token bucket, in which every packet counts for more bytes than it has."""
        links, words = self.links, ["qdisc", "replace", "dev", device, "root"]
        if links.overhead_bytes:
            # true packets, not the 64 KiB that the kernel hands on uncut where nobody looks
            _ip(namespace, [f"link set {device} gso_max_segs 1"])
            words += ["stab", "overhead", str(links.overhead_bytes), "tsize", "512"]
        words += ["tbf", "rate", f"{links.rate_mbit}mbit", "burst", str(links.burst_bytes), "latency", f"{_QUEUE_MS}ms"]
        _run("tc", "-n", namespace, *words)

    def _delay(self, undo: ExitStack) -> None:
        """Packets between hosts wait in a queue of the switch, which a process of ours empties in time."""
        _write(self._switch, [("net/bridge/bridge-nf-call-iptables", "1")])
        words = [sys.executable, "-m", "turnout.bench.lab.delay", str(self.links.delay_ms)]
        waiting = subprocess.Popen(["ip", "netns", "exec", self._switch, *words], stdout=subprocess.PIPE, text=True)
        undo.callback(_end, waiting)
        assert waiting.stdout is not None
        if "ready" not in waiting.stdout.readline():
            raise OSError("the process that delays packets did not start")
        _run("ip", "netns", "exec", self._switch, "iptables", "-A", "FORWARD", "-j", "NFQUEUE", "--queue-num", "0")


def _add_namespace(name: str, undo: ExitStack) -> None:
    _run("ip", "netns", "add", name)
    undo.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()


def _port(host: int) -> str:
    return f"p{host}"


def _mac(host: int) -> str:
    return f"02:00:0a:4d:00:{host + 1:02x}"


def _write(namespace: str, settings: Sequence[tuple[str, str]]) -> None:
    lines = [f"echo {value} > {Path('/proc/sys') / name}" for name, value in settings]
    _run("ip", "netns", "exec", namespace, "sh", "-c", " && ".join(lines))


def _ip(namespace: str, commands: Sequence[str]) -> None:
    _run("ip", "-n", namespace, "-batch", "-", said="\n".join(commands) + "\n")


def _run(*words: str, said: str = "") -> None:
    done = subprocess.run(words, check=False, input=said, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
