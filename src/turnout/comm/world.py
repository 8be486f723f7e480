"""The processes of a job: who this one is, and what all of them agree on between steps."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from turnout.comm.elastic import fresh_store
from turnout.comm.meeting import await_first, meeting
from turnout.errors import ConfigError, TransportError, TurnoutError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of its job. Of one process nothing is ever sent."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # processes of a node

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the job writes once."""
        return self.rank == 0

    def first(self, value: T) -> T:
        """What the first rank gave. Every rank calls it; the value must pickle."""
        if self.size == 1:
            return value
        box = [value if self.is_first else None]
        with naming("an agreement"):
            dist.broadcast_object_list(box, src=0)
        return box[0]  # pyright: ignore[reportReturnType]

    def all(self, value: T) -> list[T]:
        """What each rank gave, in their order. Every rank calls it; the values must pickle."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with naming("an agreement"):
            dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank. Every rank calls it.

        Raises: on every rank what it raised on the first that failed, if that is an error of ours or of a file: a rank
        that left alone would keep the others waiting.
        """
        if self.size == 1:
            return work()
        value = failure = None
        try:
            value = work()
        except TransportError:
            # a rank is gone: there is nobody to settle it with
            raise
        except (TurnoutError, OSError) as error:
            failure = error
        found = next((error for error in self.all(failure) if error is not None), None)
        if found is not None:
            raise found from failure
        return value  # pyright: ignore[reportReturnType]

    def largest(self, values: Sequence[float]) -> list[float]:
        """Of each number the largest over ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """Of each number the sum over ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.total([0.0])

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with naming("an agreement"):
            dist.all_reduce(numbers, op=how)
        return numbers.tolist()


@contextmanager
def naming(collective: str) -> Iterator[None]:
    """Raises: TransportError that names this rank and the collective where the one inside fails."""
    try:
        yield
    except RuntimeError as error:
        raise TransportError(
            f"rank {dist.get_rank()}: {collective} over {dist.get_world_size()} ranks failed, because one of "
            f"them ended or took too long: {error}"
        ) from error


def is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several.

    Raises: ConfigError if the number of them is none.
    """
    return _number("WORLD_SIZE", "1") > 1


def is_joined() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def current_world(local_size: int = 0) -> World:
    """The world of the process group there is, or of this process alone.

    `local_size` 0: as many ranks a node as torchrun started there; where torchrun did not start them all are on one.
    Raises: ConfigError if torchrun's ranks are not numbered node by node, equally many on each.
    """
    if not is_joined():
        return World()
    rank, size = dist.get_rank(), dist.get_world_size()
    is_torchruns = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")] == [str(rank), str(size)]
    if not local_size and is_torchruns and {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        _check_numbering(rank, size, int(os.environ["LOCAL_RANK"]), local_size)
    return World(rank=rank, size=size, local_size=local_size or size)


@contextmanager
def join(*, cuda: bool, timeout_s: float) -> Iterator[World]:
    """The world that torchrun started this process in, as long as the context lasts; alone without torchrun.

    CPU tensors travel by gloo, CUDA tensors by NCCL. A collective that waits longer than `timeout_s` fails.
    Raises: ConfigError if torchrun's variables are incomplete, or nodes have not equally many ranks in order;
    TransportError if the ranks do not come together in time.
    """
    if not is_launched():
        yield World()
        return
    rank, size, local_rank, local_size = _launch()
    if cuda:
        torch.cuda.set_device(local_rank)
    store = fresh_store(rank, timeout_s=timeout_s)
    if store is None:
        await_first(rank, timeout_s=timeout_s)
    with meeting(rank, size):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
    world = World(rank=rank, size=size, local_size=local_size)
    try:
        yield world
        # all is done and written: a rank that is gone already does no harm
        with suppress(TransportError):
            world.barrier()
    finally:
        dist.destroy_process_group()


def _launch() -> tuple[int, ...]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several processes, but {missing[0]} is "
            "not set; start it with torchrun"
        )
    rank, size, local_rank, local_size = (_number(name) for name in names[:4])
    _number("MASTER_PORT")
    if rank >= size or local_size < 1:
        raise ConfigError(
            f"RANK={rank} of WORLD_SIZE={size} with LOCAL_WORLD_SIZE={local_size}: ranks are numbered from 0 to "
            f"{size - 1}, at least 1 on a node, as torchrun does"
        )
    _check_numbering(rank, size, local_rank, local_size)
    return rank, size, local_rank, local_size


def _number(name: str, default: str = "") -> int:
    """Of an environment variable."""
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} in the environment must be a whole number; start this with torchrun")
    return int(value)


def _check_numbering(rank: int, size: int, local_rank: int, local_size: int) -> None:
    if rank % local_size != local_rank or size % local_size:
        raise ConfigError(
            f"RANK={rank} is LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size} on its node, WORLD_SIZE={size}: "
            "ranks must be numbered node by node, equally many on each, as torchrun --nnodes and --nproc-per-node do"
        )
