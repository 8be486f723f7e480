"""`torchrun -m turnout train` as a user starts it, by a process that has torch already."""

import os
import sys
from pathlib import Path

from torch.distributed import run as torchrun

from tests.distributed.runs import write_text
from turnout.comm.processes import start_ranks

SETTINGS = (
    "strategy.ep=2",
    "loop.tune=auto",
    "loop.steps=4",
    "loop.eval_every=2",
    "loop.seq_len=16",
    "loop.eval_tokens=64",
)
SIZES = ("model.vocab_size=300", "data.vocab_size=300", "data.val_fraction=0.2")
RUN = "launched"


def launch(folder: Path) -> None:
    """A run in `folder`/launched; what it prints in launched.out and launched.err."""
    start_ranks(_torchrun, 1, str(folder))


def _torchrun(rank: int, folder: str) -> None:
    home = Path(folder) / "home"
    home.mkdir()
    write_text(home / "text")
    os.environ |= {"TURNOUT_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{folder}/{RUN}.{end}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    words = ["--nproc-per-node", "2", "--standalone", "-m", "turnout", "train", "smoke", "--json"]
    words += ["--data", str(home / "text"), "--out", f"{folder}/{RUN}"]
    torchrun.main([*words, *(word for each in (*SETTINGS, *SIZES) for word in ("--set", each))])
