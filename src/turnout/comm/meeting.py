"""Where ranks that no agent keeps a store for meet: at the first one's, by MASTER_ADDR and MASTER_PORT."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from turnout.errors import TransportError

_TRY_S, _PAUSE_S = 3.0, 0.2


def await_first(rank: int, *, timeout_s: float) -> None:
    """Until the first rank answers: its name may be known later than this process starts, as on Kubernetes.

    Raises: TransportError if it does not in time, with what was tried last.
    """
    deadline, last = time.monotonic() + timeout_s, ""
    while rank > 0:
        try:
            socket.create_connection(_place(), timeout=_TRY_S).close()
            return
        except OSError as error:
            last = str(error)
        if time.monotonic() > deadline:
            raise TransportError(
                f"rank {rank} did not find rank 0 at {_words()} within {timeout_s:.0f} s ({last}): start rank 0 too, "
                "and give all ranks the address of its host"
            )
        time.sleep(_PAUSE_S)


@contextmanager
def meeting(rank: int, size: int) -> Iterator[None]:
    """Raises: TransportError that says who waited where, if the ranks do not come together."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TransportError(
            f"rank {rank} of {size} did not meet the others at {_words()}: {reason} Every rank must be started, with "
            "the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE and a RANK of its own, and the port be free"
        ) from error


def _place() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _words() -> str:
    return f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
