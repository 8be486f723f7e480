"""Ranks of this machine, for a check: started together and waited for."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import multiprocessing as torch_processes

from turnout.comm.world import World

# what takes seconds to import: done once, where ranks are forked from a process that has it
_PRELOAD = ["torch", "torch._dynamo"]


@contextmanager
def as_rank(rank: int, ranks: int, folder: str, *, timeout_s: float) -> Iterator[World]:
    """This process as one of `ranks` on this machine that speak gloo, whatever torchrun says; all leave together.

    They find each other by a file in `folder`, which is empty when they start.
    """
    for name in ("WORLD_SIZE", "RANK"):
        os.environ.pop(name, None)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    yield World(rank=rank, size=ranks, local_size=ranks)
    dist.barrier()
    dist.destroy_process_group()


def start_ranks(work: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in so many processes; an exception in one ends all, and is raised here.

    They end with this call, however it ends: a rank left waiting for another would keep its parent from exiting.
    """
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.get_context(method).set_forkserver_preload([*_PRELOAD, "turnout.train.step"])
    started = torch_processes.start_processes(work, args=arguments, nprocs=ranks, start_method=method, join=False)
    assert started is not None
    try:
        while not started.join():
            pass
    except BaseException:
        for process in started.processes:
            assert process is not None
            process.kill()
        raise
