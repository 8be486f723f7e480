"""A place for the lab where nothing of it can be left over, and whether this machine allows it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

# where each command is from, as Debian and its kin call the package
_PACKAGES = {"unshare": "util-linux", "ip": "iproute2", "tc": "iproute2", "iptables": "iptables"}
_PROBE_S = 30.0
_SETUP = 'mount --make-rprivate / && mount -t tmpfs lab /run && mkdir -p /run/netns && ip link set lo up && exec "$@"'
_HOSTS = """
ip netns add probe
ip -n probe link add p0 gso_max_segs 1 type veth peer name eth0
ip -n probe link add br0 type bridge forward_delay 0
tc -n probe qdisc replace dev p0 root stab overhead 1000 tsize 512 tbf rate 100mbit burst 64kb latency 50ms
"""
_DELAY = """
ip netns exec probe sh -c 'echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables'
ip netns exec probe iptables -A FORWARD -j NFQUEUE --queue-num 0
"""


def isolated(words: Sequence[str]) -> list[str]:
    """The command line that runs `words` in network, mount and process namespaces of its own.

    What is made inside - processes, hosts, links - is gone once that command ends, whatever ends it, and reaches no
    address of this machine. Who is not root becomes it inside, where user namespaces are allowed.
    """
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    own = ["--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return ["unshare", *as_root, *own, "sh", "-c", _SETUP, "lab", *words]


@lru_cache
def why_not(*, delay: bool = False) -> str:
    """Why there can be no lab here, with the package or permission that is missing; empty if there can be one.

    `delay`: a lab whose links have a latency, which asks for more.
    """
    if sys.platform != "linux":
        return f"hosts are emulated by network namespaces of Linux; this is {sys.platform}"
    commands = ("unshare", "ip", "tc", *(("iptables",) if delay else ()))
    missing = next((command for command in commands if shutil.which(command) is None), None)
    if missing is not None:
        return f"no `{missing}` here: install the package {_PACKAGES[missing]}"
    script = "set -e\n" + _HOSTS + (_DELAY if delay else "")
    try:
        done = subprocess.run(
            isolated(["sh", "-c", script]), check=False, capture_output=True, text=True, timeout=_PROBE_S
        )
    except subprocess.TimeoutExpired:
        return f"a lab of one host was not up within {_PROBE_S:.0f} s"
    if done.returncode == 0:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    right = "" if os.geteuid() == 0 else " (not root: user namespaces must be allowed)"
    return f"{said[-1] if said else 'the kernel refuses namespaces'}{right}"
