"""Ranks started for a check end with it, even if it is cut off while they wait."""

import os
import signal
import time
from pathlib import Path

import pytest

from turnout.comm.processes import start_ranks


def _wait(rank: int, folder: str) -> None:
    (Path(folder) / str(rank)).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_that_wait_end_with_a_check_that_is_cut_off(tmp_path: Path) -> None:
    def cut_off(*_: object) -> None:
        if sum(file.stat().st_size > 0 for file in tmp_path.iterdir()) == 2:
            raise TimeoutError("cut off")
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    timer_of_pytest = signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, cut_off)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError, match="cut off"):
            start_ranks(_wait, 2, str(tmp_path))
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer_of_pytest)
    ids = [int((tmp_path / name).read_text(encoding="utf-8")) for name in ("0", "1")]
    until = time.monotonic() + 10
    while any(map(_runs, ids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(_runs, ids))
