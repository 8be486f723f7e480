"""The processes of `turnout bench alltoall`: `python -m turnout.bench.alltoall_ranks CASE`, a case as JSON.

Prints one JSON object: when each round was over on the last rank, and who sent how much by whose count.
"""

import gc
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from turnout.alltoall import PROGRAMS, combine, dispatch
from turnout.bench.alltoall_case import ALL_GATHER, ExchangeCase
from turnout.bench.lab import Lab
from turnout.bench.ranks import fork_ranks
from turnout.comm import Arrived, ExpertGroup, Ledger, Sizes, TorchTransport, World, kernel_count, make_groups
from turnout.comm.picks import Picks
from turnout.errors import TransportError
from turnout.placement import Placement
from turnout.strategy import Strategy

TIMEOUT_S = 120.0
_READY_S = 2e-3  # from the word to start to the start
Work = Callable[[], object]


def main() -> None:
    case = ExchangeCase.from_json(json.loads(sys.argv[1]))
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(case.hosts, case.links)) if case.lab else None
        found = fork_ranks(
            lambda world: _measured(case, world), case.mesh, lab=lab, timeout_s=TIMEOUT_S + _longest(case)
        )
    print(json.dumps({"seconds": _of_slowest(found), "counts": _counts(found)}))


def _longest(case: ExchangeCase) -> float:
    """A generous guess of what the rounds take."""
    each = case.repeat * (0.1 + case.mesh.size**2 * 1e-4 + 2e-2 * case.links.delay_ms)
    return 2 * len(case.names) * len(case.row_bytes) * (case.rounds + case.warmup) * each


def _measured(case: ExchangeCase, world: World) -> dict[str, Any]:
    strategy = Strategy(ep=world.size, dp=world.size)
    group = make_groups(strategy, world, timeout_s=TIMEOUT_S, share_memory=case.share_memory).experts
    assert group is not None
    quiet, ignored = _quiet_group(world)
    contestants: dict[str, Work] = {}
    counts = {}
    for row_bytes in case.row_bytes:
        for name in case.names:
            if name == ALL_GATHER:
                contestants[f"{row_bytes} wire {name}"] = _gathering(case, world, row_bytes)
                continue
            exchange = _Exchange(case, name, replace(group, shared={}), row_bytes)
            exchange.check()
            counts[f"{row_bytes} {name}"] = _counted(exchange, quiet, ignored)
            contestants[f"{row_bytes} rows {name}"] = exchange.there
            contestants[f"{row_bytes} wire {name}"] = exchange.bare()
            if group.shared:
                exchange = _Exchange(case, name, group, row_bytes)
                exchange.check()
                contestants[f"{row_bytes} shared_rows {name}"] = exchange.there
                contestants[f"{row_bytes} shared_wire {name}"] = exchange.bare()
    return {"ends": _raced(contestants, case, world, quiet), "counts": counts}


class _Exchange:
    """One program on one rank, with rows that say whose they are."""

    def __init__(self, case: ExchangeCase, name: str, group: ExpertGroup, row_bytes: int) -> None:
        self._case, self._rank, self._group = case, group.rank, group
        self.name, self.ledger = name, Ledger()
        self._program = PROGRAMS[name]
        self._transport = TorchTransport(self._program, group, self.ledger, name)
        self._placement = Placement.even(case.num_experts, group.mesh.size)
        self._sizes, self._x_TD = _sizes(case, self._placement, group), _rows(case, self._rank, row_bytes)
        token_M = torch.tensor(_by_expert(case, self._rank), dtype=torch.int64)
        self._picks = Picks(index_M=token_M, num_rows=case.num_tokens, one_each=False)
        self._weight_M = torch.ones(len(token_M))

    def there(self) -> Arrived:
        """Rows at their experts, as a layer sends them once the counts are known."""
        parcels = self._transport.load(self._x_TD, self._sizes, picks=self._picks, weight_M=self._weight_M)
        return self._transport.arrive(dispatch(self._program, self._transport, parcels))

    def there_and_back(self) -> Tensor:
        """The sum of each token's copies. Shapes: returns (T, D)."""
        arrived = self.there()
        return combine(self._program, self._transport, self._transport.depart(arrived, arrived.x_MD)).sums()

    def check(self) -> None:
        """Raises: TransportError if a row is missing, or is somebody else's."""
        want = []
        for expert in self._placement.experts_of(self._rank):
            for source in range(self._group.mesh.size):
                tokens = enumerate(self._case.choices(source))
                want += [_mark(source, token) for token, choices in tokens if expert in choices]
        got_M = self.there().x_MD[:, 0]
        if got_M.tolist() != want:
            raise TransportError(f"rank {self._rank}: {self.name} does not deliver the rows it was given")
        home_T = self.there_and_back()[:, 0]
        if not torch.equal(home_T, self._x_TD[:, 0] * self._case.k):
            raise TransportError(f"rank {self._rank}: {self.name} does not bring back the rows it delivered")

    def bare(self) -> Work:
        """The collectives alone: as many bytes between the same ranks, ready and unread."""
        calls = []
        for sent in self.there().parcels.trail:
            if sent.route is None:
                continue
            route, row_bytes = sent.route, self._x_TD.shape[1] * self._x_TD.element_size()
            out, in_ = (_bytes(route.rows[way], route.labels[way], row_bytes) for way in (0, 1))
            source, target = (torch.zeros(sum(each), dtype=torch.uint8) for each in (out, in_))
            calls.append((target, source, in_, out, route))

        def collectives() -> None:
            for target, source, in_, out, route in calls:
                if route.shared is not None:
                    route.shared.all_to_all(source, in_, out)
                    continue
                dist.all_to_all_single(target, source, in_, out, group=route.group)

        return collectives


def _bytes(rows: tuple[int, ...], labels: tuple[int, ...], row_bytes: int) -> list[int]:
    """For each peer: rows, and of merged ones the labels, of which each is an int32 and a float32."""
    return [row_bytes * number + 8 * (labels[peer] if labels else 0) for peer, number in enumerate(rows)]


def _rows(case: ExchangeCase, rank: int, row_bytes: int) -> Tensor:
    """Shapes: returns (T, D), every row full of its mark."""
    mark_T = torch.tensor([_mark(rank, token) for token in range(case.num_tokens)])
    return mark_T.unsqueeze(1).repeat(1, row_bytes // mark_T.element_size())


def _mark(rank: int, token: int) -> float:
    # whole numbers that float32 has exactly, also k times as large
    return float((rank * 7919 + token) % 65521 + 1)


def _by_expert(case: ExchangeCase, rank: int) -> list[int]:
    """The tokens of a rank's rows in order of the experts they go to."""
    rows = [(expert, token) for token, choices in enumerate(case.choices(rank)) for expert in choices]
    return [token for _, token in sorted(rows)]


def _sizes(case: ExchangeCase, placement: Placement, group: ExpertGroup) -> Sizes:
    mesh, routing = group.mesh, case.routing
    experts = [[0] * case.num_experts for _ in range(mesh.size)]
    for source in range(mesh.size):
        for choices in case.choices(source):
            for expert in choices:
                experts[source][expert] += 1
    ranks, firsts = range(mesh.size), range(0, mesh.size, mesh.local)
    return Sizes(
        mesh=mesh,
        placement=placement,
        experts=experts,
        merged={
            "rank": [[routing.rows("rank", source, to) for to in ranks] for source in ranks],
            "node": [[routing.rows("node", source, first) for first in firsts] for source in ranks],
        },
        slices=[[sum(each[expert] for each in experts) for expert in placement.experts_of(group.rank)]],
    )


def _gathering(case: ExchangeCase, world: World, row_bytes: int) -> Work:
    x_TD = _rows(case, world.rank, row_bytes)
    out = x_TD.new_empty(world.size * x_TD.shape[0], x_TD.shape[1])
    return lambda: dist.all_gather_into_tensor(out, x_TD)


# --- counting ---


def _quiet_group(world: World) -> tuple[ProcessGroup, set[kernel_count.Connection]]:
    """A group for what is not measured, and its connections, which are not counted."""
    before = set(kernel_count.received())
    quiet = cast(ProcessGroup, dist.new_group(list(range(world.size))))
    dist.barrier(group=quiet)
    return quiet, set(kernel_count.received()) - before


def _counted(exchange: _Exchange, quiet: ProcessGroup, ignored: set[kernel_count.Connection]) -> dict[str, Any]:
    """What this rank handed over, and what the kernel says it received, for one way there and back."""
    exchange.ledger.clear()
    before = _quietly(quiet)
    exchange.there_and_back()
    after = _quietly(quiet)
    received = {ends: after[ends] - before.get(ends, 0) for ends in after if ends not in ignored}
    return {"ledger": exchange.ledger.sent(exchange.name, "forward"), "received": received}


def _quietly(quiet: ProcessGroup) -> dict[kernel_count.Connection, int]:
    dist.barrier(group=quiet)
    now = kernel_count.received()
    dist.barrier(group=quiet)
    return now


def _counts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each size and program: [sender, receiver, bytes, messages by the ledger, by the kernel] of every pair."""
    tables = {}
    for key in found[0]["counts"]:
        of_ranks = [each["counts"][key] for each in found]
        by_kernel = kernel_count.matrix([each["received"] for each in of_ranks])
        tables[key] = [
            [sender, receiver, *sent, by_kernel.get((sender, receiver), 0) - kernel_count.GLOO_BYTES * sent[1]]
            for sender, each in enumerate(of_ranks)
            for receiver, sent in sorted(each["ledger"].items())
        ]
    return tables


# --- timing ---


def _raced(
    contestants: Mapping[str, Work], case: ExchangeCase, world: World, quiet: ProcessGroup
) -> dict[str, list[float]]:
    """For each, round by round, the seconds from the common start until this rank was done."""
    ends: dict[str, list[float]] = defaultdict(list)
    gc.collect()
    gc.freeze()
    gc.disable()
    for number in range(case.warmup + case.rounds):
        for name in random.Random(number).sample(sorted(contestants), len(contestants)):
            start_s = _common_start(world, quiet, case)
            for _ in range(case.repeat):
                contestants[name]()
            elapsed_s = (time.perf_counter() - start_s) / case.repeat
            if number >= case.warmup:
                ends[name].append(elapsed_s)
    return dict(ends)


def _common_start(world: World, quiet: ProcessGroup, case: ExchangeCase) -> float:
    """Wait until the moment that the first rank names once all are here: the clock is that of the whole machine."""
    dist.barrier(group=quiet)
    ready_s = _READY_S + 2e-4 * world.size + 4e-3 * case.links.delay_ms
    start = torch.tensor([time.perf_counter() + ready_s if world.is_first else 0.0], dtype=torch.float64)
    dist.broadcast(start, src=0, group=quiet)
    start_s = float(start)
    time.sleep(max(0.0, start_s - time.perf_counter()))
    return start_s


def _of_slowest(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """An exchange is over when it is over on every rank."""
    return {
        name: [max(of_round) for of_round in zip(*(each["ends"][name] for each in found), strict=True)]
        for name in found[0]["ends"]
    }


if __name__ == "__main__":
    main()
