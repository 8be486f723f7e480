"""The command of a benchmark's ranks, in a lab of its own where the case wants one: a case in, what they found out."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from turnout.bench.lab import Links, isolated, why_not
from turnout.errors import TransportError, TurnoutError

_LONGEST_S = 1800.0


def started(module: str, case: Mapping[str, Any], *, lab: bool) -> dict[str, Any]:
    """What `python -m MODULE CASE` prints last, the case and the answer as JSON.

    Raises: TransportError with the last line of what it said if it fails.
    """
    words = [sys.executable, "-m", module, json.dumps(case)]
    # ranks are many and cores few; and hosts of a lab have no names to look up, of which torch speaks at length
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        isolated(words) if lab else words,
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=_LONGEST_S,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise TransportError(f"the ranks did not come to an end: {said[-1] if said else f'exit {done.returncode}'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_lab(links: Links, *, lab: bool) -> None:
    """Raises: TurnoutError where a lab is asked for and this machine cannot have one."""
    reason = why_not(delay=links.delay_ms > 0) if lab else ""
    if reason:
        raise TurnoutError(f"no lab here: {reason}; without --lab all ranks are on loopback")
