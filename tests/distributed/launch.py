"""`torchrun -m turnout train` as a user starts it, by a process that has torch; a rank may be killed meanwhile."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch.distributed import run as torchrun

from tests.distributed.runs import write_text
from turnout.comm.processes import start_ranks

SETTINGS = (
    "loop.seq_len=16",
    "loop.eval_tokens=64",
    "loop.timeout_s=60",
    "loop.keep_last=99",
    'loop.precision="float32"',  # compared with one process to 1e-4, which bfloat16 does not keep
)
SIZES = ("model.vocab_size=300", "data.vocab_size=300", "data.val_fraction=0.2")
# counted over all ranks, so that one process has the same
LOSSES = "model.moe.losses=[{name = 'load_balance', scope = 'global'}]"
BESIDE = ("loop.checkpoint=sharded", "loop.async_save=true")  # how the run that all tests share is saved
RUN = "launched"
STEPS, KILLED_AT = 12, 6  # of the run that all tests share
_PAUSE_S, _SHARE_IN_TRAINING = 0.02, 0.7
Disturb = Callable[[threading.Event], None]  # until the event is set


def launch(folder: Path) -> None:
    """A run in `folder`/launched, of which a rank is killed; what it prints in launched.out and launched.err."""
    write_home(folder)
    settings = ("strategy=auto", f"loop.steps={STEPS}", "loop.eval_every=4", "loop.save_every=4", *BESIDE)
    started(folder, RUN, settings, restarts=1, disturb=partial(kill_at_step, folder / RUN, KILLED_AT))


def write_home(folder: Path) -> None:
    """The text, and room for what is made of it."""
    home = folder / "home"
    home.mkdir()
    write_text(home / "text")


def started(
    folder: Path, name: str, settings: Sequence[str], *, restarts: int = 0, disturb: Disturb | None = None
) -> None:
    """torchrun with two ranks, until its end, whichever that is; `disturb` goes on beside it."""
    stopped = threading.Event()
    beside = threading.Thread(target=disturb, args=(stopped,), daemon=True) if disturb else None
    if beside:
        beside.start()
    try:
        start_ranks(_torchrun, 1, str(folder), name, tuple(settings), restarts)
    finally:
        stopped.set()
        if beside:
            beside.join()


def kill_at_step(run: Path, step: int, stopped: threading.Event) -> None:
    """SIGKILL to the second rank as soon as the run has recorded that step."""
    while not stopped.wait(_PAUSE_S):
        if _recorded(run) >= step:
            _kill(run, 1)
            return


def kill_at_random(run: Path, times: int, longest_s: float, stopped: threading.Event) -> None:
    """SIGKILL to either rank, so often: most after the run has got on since the last one, others in a start."""
    draw = random.Random(times)
    while times and not stopped.is_set():
        if draw.random() < _SHARE_IN_TRAINING:
            before = _recorded(run)
            while _recorded(run) == before and not stopped.wait(_PAUSE_S):
                pass
        if stopped.wait(draw.uniform(0, longest_s)):
            return
        times -= _kill(run, draw.randrange(2))


def kills(run: Path) -> list[int]:
    """The ranks that were killed, in order."""
    return [int(line) for line in run.with_suffix(".kills").read_text(encoding="utf-8").splitlines()]


def _recorded(run: Path) -> int:
    """Steps that the run has written down; after a restart they are fewer again."""
    with suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b'{"kind":"step"')
    return 0


def _kill(run: Path, rank: int) -> bool:
    """Whether there was such a rank: a worker's command line has the run's folder, its environment the number."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words, numbered = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            if str(run).encode() in words.split(b"\0") and f"RANK={rank}".encode() in numbered.split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
                with run.with_suffix(".kills").open("a", encoding="utf-8") as file:
                    print(rank, file=file)
                return True
    return False


def _torchrun(rank: int, folder: str, name: str, settings: tuple[str, ...], restarts: int) -> None:
    home = Path(folder) / "home"
    os.environ |= {"TURNOUT_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{folder}/{name}.{end}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    words = ["--nproc-per-node", "2", "--max-restarts", str(restarts), "--standalone"]
    words += ["-m", "turnout", "train", "smoke", "--json", "--data", str(home / "text"), "--out", f"{folder}/{name}"]
    torchrun.main([*words, *(word for each in (*SETTINGS, *SIZES, LOSSES, *settings) for word in ("--set", each))])
