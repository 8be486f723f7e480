"""Ranks of this machine, for a check: started together and waited for."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch import multiprocessing as torch_processes

# what takes seconds to import: done once, where ranks are forked from a process that has it
_PRELOAD = ["torch", "torch._dynamo"]


def start_ranks(work: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in so many processes; an exception in one ends all, and is raised here."""
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.get_context(method).set_forkserver_preload([*_PRELOAD, "turnout.train.step"])
    torch_processes.start_processes(work, args=arguments, nprocs=ranks, start_method=method)
