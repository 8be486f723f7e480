"""Restarts by torchrun: a store for the processes of now, and what a job remembers of the ones before.

torchrun's agent keeps one store for all generations of its workers, and torch reads the addresses of dead ones out of
it (pytorch issue 135712). So the first rank opens a store of its own each time, and the agent's only says where.
"""

import json
import os
import socket
import time
import uuid
from datetime import timedelta

from torch.distributed import Store, TCPStore

from turnout.errors import TransportError

_SERVER, _TOKEN, _BEGUN = "turnout/server", "turnout/token", "turnout/begun"
_AGENT_S = 60.0  # for the agent, which is there before its workers
_TRY_S, _PAUSE_S = 3.0, 0.1  # for a server that may be gone, and between two tries


def fresh_store(rank: int, *, timeout_s: float) -> Store | None:
    """A store that only processes started together share; None where no agent keeps one, and env:// will do.

    Raises: TransportError if the first rank does not open one in time.
    """
    agent = _agent_store()
    if agent is None:
        return None
    if rank == 0:
        return _announced(agent, timeout_s)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        store = _found(agent, timeout_s)
        if store is not None:
            return store
        time.sleep(_PAUSE_S)
    raise TransportError(f"rank {rank} waited {timeout_s:.0f} s for rank 0 to open a store: it did not start")


def begun_run() -> str | None:
    """What an earlier process of this job gave `remember_run`; None if there was none, or nobody keeps it."""
    agent = _agent_store()
    if agent is None or not agent.check([_BEGUN]):
        return None
    return agent.get(_BEGUN).decode()


def remember_run(run: str) -> None:
    """From here on a restart of this job goes on in `run`."""
    agent = _agent_store()
    if agent is not None:
        agent.set(_BEGUN, run)


def _agent_store() -> Store | None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    return _opened(*_agent_address(), _AGENT_S)


def _agent_address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _announced(agent: Store, timeout_s: float) -> Store:
    """A store of this process, of which the agent's says where it is."""
    # this host by the address that the agent sees: ranks of other hosts reach it there
    with socket.create_connection(_agent_address(), timeout=_AGENT_S) as way:
        host = way.getsockname()[0]
    store, token = _opened(host, 0, timeout_s, is_master=True), uuid.uuid4().hex
    store.set(_TOKEN, token)
    agent.set(_SERVER, json.dumps([host, store.port, token]))
    return store


def _found(agent: Store, timeout_s: float) -> Store | None:
    """The store the agent's names, unless it is that of an earlier generation: gone, or with another token."""
    if not agent.check([_SERVER]):
        return None
    host, port, token = json.loads(agent.get(_SERVER))
    try:
        # asked first without torch, whose client retries and prints a page for every server that is gone
        socket.create_connection((host, port), timeout=_TRY_S).close()
        store = _opened(host, port, timeout_s)
    except (OSError, RuntimeError):
        return None
    return store if store.check([_TOKEN]) and store.get(_TOKEN).decode() == token else None


def _opened(host: str, port: int, timeout_s: float, *, is_master: bool = False) -> TCPStore:
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
