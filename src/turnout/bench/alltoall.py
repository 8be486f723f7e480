"""`turnout bench alltoall`: the programs in turns over real connections, beside what the planner says of them."""

import sys
from typing import Any

from turnout.alltoall import PROGRAMS, pairs_of, round_trip
from turnout.bench.alltoall_case import ALL_GATHER, ExchangeCase
from turnout.bench.alltoall_cost import (
    copies_between,
    crossover,
    exchange_s,
    expected_copies,
    planned_crossover,
    row_size,
)
from turnout.bench.lab import Links
from turnout.bench.race import Timing, ratio
from turnout.bench.run import ratio_keys, result, row
from turnout.bench.started import check_lab, started
from turnout.errors import TransportError

_OFF = (0.99, 1.01)  # a percent either way in the ratio of two planned times
_MOST_PAIRS = 256  # of which a table is printed pair by pair


def run(case: ExchangeCase) -> dict[str, Any]:
    """Times, bytes by three counts, and where `flat` becomes the faster one, as `--json` prints them.

    Raises: TurnoutError where a lab is asked for and this machine cannot have one; TransportError if a program does
    not deliver, or planner, ledger and kernel do not count alike.
    """
    check_lab(case.links, lab=case.lab)
    found = started("turnout.bench.alltoall_ranks", case.to_json(), lab=case.lab)
    traffic = [_traffic(case, size, name, found["counts"]) for size in case.row_bytes for name in _counted(case)]
    rows = _rows(case, found["seconds"])
    asked = {"hosts": case.hosts, "ranks": case.ranks, "tokens": case.num_tokens, "experts": case.num_experts}
    asked |= {"k": case.k, "rounds": case.rounds, "repeat": case.repeat}
    return result(rows, traffic=traffic, crossover=_crossovers(case, rows), mesh=asked, links=_links(case))


def _counted(case: ExchangeCase) -> list[str]:
    return [name for name in case.names if name != ALL_GATHER]


def _traffic(case: ExchangeCase, row_bytes: int, name: str, counts: dict[str, Any]) -> dict[str, Any]:
    """One way there and back, rank by rank.

    Raises: TransportError naming the first pair that is not counted alike.
    """
    routing, local = case.routing, case.ranks
    planned = pairs_of(round_trip(PROGRAMS[name], routing.mesh), routing, row_size(row_bytes))
    pairs = counts[f"{row_bytes} {name}"]
    got = {(sender, receiver): [sent, messages] for sender, receiver, sent, messages, _ in pairs}
    for sender, receiver in sorted(planned.keys() | got.keys()):
        plan, ledger = planned.get((sender, receiver), [0, 0]), got.get((sender, receiver), [0, 0])
        if list(plan) != ledger:
            raise TransportError(f"{name}: from rank {sender} to {receiver} {plan} were planned, {ledger} handed over")
    for sender, receiver, sent, _, by_kernel in pairs:
        if sys.platform == "linux" and by_kernel != sent:
            raise TransportError(f"{name}: from rank {sender} to {receiver} {sent} bytes left, {by_kernel} came")
    sums = {
        f"{where}_{what}": sum(
            pair[at] for pair in pairs if (pair[0] // local == pair[1] // local) == (where == "intra")
        )
        for where in ("intra", "inter")
        for what, at in (("bytes", 2), ("messages", 3))
    }
    return {
        "program": name,
        "row_bytes": row_bytes,
        **sums,
        "pairs_equal": len(pairs),
        # of a token, on its way to the experts
        "copies_between_hosts": copies_between(case, name),
        "copies_expected": expected_copies(case, name),
        "pairs": pairs if len(pairs) <= _MOST_PAIRS else None,
    }


def _rows(case: ExchangeCase, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    timings = {key: Timing(ms=tuple(1e3 * each for each in of_rounds)) for key, of_rounds in seconds.items()}
    links, rows = _links_of(case), []
    for key in sorted(timings, key=_in_order):
        timing, (size, mode, name) = timings[key], key.split(" ")
        planned_ms = None
        if mode == "wire" and name != ALL_GATHER:
            planned_ms = 1e3 * exchange_s(name, case.routing, int(size), links)
        flat = timings[f"{size} {mode} flat"]
        own = {"mode": mode, "dtype": "uint8" if "wire" in mode else "float32", "threads": 1, "row_bytes": int(size)}
        base = mode.removeprefix("shared_")
        gloo = ratio(timings[f"{size} {base} {name}"], timing) if base != mode else None
        speedup = ratio_keys("speedup_over_flat", ratio(flat, timing))
        best = {"speedup_of_minima": min(flat.ms) / min(timing.ms), "planned_ms": planned_ms}
        rows.append(row("alltoall", name, timing) | own | speedup | ratio_keys("speedup_over_gloo", gloo) | best)
    return rows


def _in_order(key: str) -> tuple[int, str, str]:
    size, mode, name = key.split(" ")
    return int(size), mode, name


def _crossovers(case: ExchangeCase, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each program beside flat: which is faster with small rows, and from which size on the other one is."""
    found, links = [], _links_of(case)
    flat_s = exchange_s("flat", case.routing, case.row_bytes[0], links)
    for name in _counted(case):
        # on this mesh some make the very collectives of flat
        if name == "flat" or exchange_s(name, case.routing, case.row_bytes[0], links) == flat_s:
            continue
        wires = [each for each in rows if each["peer"] == name and each["mode"] == "wire"]
        measured = crossover(name, sorted((each["row_bytes"], each["speedup_over_flat"]) for each in wires))
        planned, *off = (planned_crossover(name, case.routing, links, lead=lead) for lead in (1.0, *_OFF))
        own = {"measured": vars(measured), "planned": vars(planned)}
        found.append({"program": name, **own, "planned_a_percent_off": [vars(each) for each in off]})
    return found


def _links_of(case: ExchangeCase) -> Links | None:
    return case.links if case.lab else None


def _links(case: ExchangeCase) -> dict[str, Any] | None:
    return vars(case.links) if case.lab else None
