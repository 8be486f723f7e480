"""Many ranks cheaply: forked from a process that has torch, on hosts of a lab or on this machine's own loopback."""

import mmap
import os
import pickle
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.multiprocessing import ProcessContext, start_processes

from turnout.bench.lab import Lab
from turnout.comm import World
from turnout.errors import TransportError
from turnout.topology import Mesh

T = TypeVar("T")
_LOOPBACK, _PAUSE_S, _LEAVE_S = "127.0.0.1", 0.002, 20.0


def fork_ranks(work: Callable[[World], T], mesh: Mesh, *, lab: Lab | None = None, timeout_s: float = 120.0) -> list[T]:
    """What `work` gave on each rank of `mesh`, whose nodes are the lab's hosts; without a lab all are on loopback.

    Ranks have a gloo process group and one thread; what they give must pickle. This process may not have computed
    anything with torch yet: threads do not survive a fork.
    Raises: what a rank raised, after all have been ended; TransportError if they take longer than `timeout_s`.
    """
    shared = mmap.mmap(-1, 8 + mesh.size)  # the store's port, then a byte for each rank that is done
    with TemporaryDirectory() as folder:
        arguments = (work, mesh, lab, shared, folder, timeout_s)
        started = start_processes(_rank, args=arguments, nprocs=mesh.size, join=False, start_method="fork")
        assert started is not None
        _wait(started, time.monotonic() + timeout_s)
        # written by our own ranks, in a folder of our own
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(mesh.size)]


def _wait(started: ProcessContext, deadline: float) -> None:
    try:
        while not started.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TransportError("the ranks are not done in time; give them longer, fewer rounds or fewer ranks")
    finally:
        for process in started.processes:
            process.kill()
            process.join()


def _rank(
    rank: int,
    work: Callable[[World], Any],
    mesh: Mesh,
    lab: Lab | None,
    shared: mmap.mmap,
    folder: str,
    timeout_s: float,
) -> None:
    torch.set_num_threads(1)
    if lab is not None:
        lab.enter(mesh.place(rank)[0])
    host = _LOOPBACK if lab is None else lab.address(0)
    # hosts of a lab have one name between them, by which gloo would look for the address
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if lab is None else "eth0"
    store, timeout = _store(rank, host, shared, timeout_s), timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=mesh.size, timeout=timeout)
    given = work(World(rank=rank, size=mesh.size, local_size=mesh.local))
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(given))
    _leave_together(rank, shared, mesh.size)


def _store(rank: int, host: str, shared: mmap.mmap, timeout_s: float) -> TCPStore:
    timeout, deadline = timedelta(seconds=timeout_s), time.monotonic() + timeout_s
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        struct.pack_into("=q", shared, 0, store.port)
        return store
    while not (port := struct.unpack_from("=q", shared, 0)[0]):
        if time.monotonic() > deadline:
            raise TransportError(f"rank {rank}: rank 0 opened no store in {timeout_s:.0f} s")
        time.sleep(_PAUSE_S)
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _leave_together(rank: int, shared: mmap.mmap, size: int) -> None:
    """Who ends closes connections, which gloo takes for a failure on ranks that are not done: all wait for all."""
    deadline = time.monotonic() + _LEAVE_S
    shared[8 + rank] = 1
    while shared[8 : 8 + size] != b"\1" * size and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    with suppress(RuntimeError):
        dist.destroy_process_group()
    # forked: what the parent would do at its end is not ours to do
    os._exit(0)
