"""The processes of `turnout bench alltoall`: `python -m turnout.bench.alltoall_ranks CASE`, a case as JSON.

Prints one JSON object: when each round was over on the last rank, and who sent how much by whose count.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup

from turnout.bench.alltoall_case import ALL_GATHER, ExchangeCase
from turnout.bench.alltoall_exchange import Exchange, gathering
from turnout.bench.lab import Lab
from turnout.bench.ranks import fork_ranks
from turnout.bench.turns import Work, in_turns, of_slowest
from turnout.comm import Lines, World, kernel_count, make_groups
from turnout.strategy import Strategy

TIMEOUT_S = 120.0


def main() -> None:
    case = ExchangeCase.from_json(json.loads(sys.argv[1]))
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(case.hosts, case.links)) if case.lab else None
        found = fork_ranks(
            lambda world: _measured(case, world), case.mesh, lab=lab, timeout_s=TIMEOUT_S + _longest(case)
        )
    print(json.dumps({"seconds": of_slowest([each["ends"] for each in found]), "counts": _counts(found)}))


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
                contestants[f"{row_bytes} wire {name}"] = gathering(case, world, row_bytes)
                continue
            exchange = Exchange(case, name, replace(group, lines=Lines()), row_bytes)
            exchange.check()
            counts[f"{row_bytes} {name}"] = _counted(exchange, quiet, ignored)
            contestants[f"{row_bytes} rows {name}"] = exchange.there
            contestants[f"{row_bytes} wire {name}"] = exchange.bare()
            if group.lines.of_group:
                exchange = Exchange(case, name, group, row_bytes)
                exchange.check()
                contestants[f"{row_bytes} shared_rows {name}"] = exchange.there
                contestants[f"{row_bytes} shared_wire {name}"] = exchange.bare()
    ends = in_turns(
        contestants,
        world,
        quiet,
        rounds=case.rounds,
        warmup=case.warmup,
        repeat=case.repeat,
        delay_ms=case.links.delay_ms,
    )
    return {"ends": ends, "counts": counts}


# --- counting ---


def _quiet_group(world: World) -> tuple[ProcessGroup, set[kernel_count.Connection]]:
    """A group for what is not measured, and its connections, which are not counted."""
    before = set(kernel_count.received())
    quiet = cast(ProcessGroup, dist.new_group(list(range(world.size))))
    dist.barrier(group=quiet)
    return quiet, set(kernel_count.received()) - before


def _counted(exchange: Exchange, quiet: ProcessGroup, ignored: set[kernel_count.Connection]) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
