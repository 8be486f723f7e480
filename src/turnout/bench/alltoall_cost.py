"""How long an exchange takes by the planner's bytes and messages, at the costs of this machine and of a lab's links."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log

from turnout.alltoall import PROGRAMS, Move, RoutedTokens, RowSize, UniformRouting, pairs_of, round_trip, traffic_of
from turnout.bench.alltoall_case import ExchangeCase
from turnout.bench.lab import Links

# TCP over Ethernet: bytes of headers in each packet, and of those the part that the mtu counts
_HEADERS, _IN_MTU = 66, 52
_GLOO_HEADER = 48


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Processor time of gloo's exchanges, of all ranks together, and what a message costs on a link.

    Measured on two cores, 8 to 64 ranks on loopback, 16 bytes to 64 KiB (median error 9 %, worst 41 %): docs/LOG.md.
    """

    call_s: float = 150e-6  # a rank enters a collective
    message_s: float = 19.6e-6
    byte_s: float = 0.38e-9
    packets: float = 3.9  # of a small message: gloo's three headers, the payload, and their acknowledgements


_ONE = RowSize(row_bytes=1, back_bytes=1)
# merged rows take with them which row (int32) and which weight (float32) belong to an assignment
LABEL_BYTES = 8.0


def row_size(row_bytes: int) -> RowSize:
    """A row that is as large on the way back."""
    return RowSize(row_bytes=row_bytes, back_bytes=row_bytes, label_bytes=LABEL_BYTES)


def there(program: str, routing: RoutedTokens) -> tuple[Move, ...]:
    """The collectives of a dispatch."""
    return tuple(move for move in round_trip(PROGRAMS[program], routing.mesh) if not move.back)


def copies_between(case: ExchangeCase, program: str) -> float:
    """Rows that cross to another host on the way to the experts, for each token, as the case routes them."""
    local, pairs = case.ranks, pairs_of(there(program, case.routing), case.routing, _ONE)
    crossing = sum(rows for (sender, receiver), (rows, _) in pairs.items() if sender // local != receiver // local)
    return crossing / (case.mesh.size * case.num_tokens)


def expected_copies(case: ExchangeCase, program: str) -> float:
    """The same on average over all routings in which every expert is as likely: the closed form."""
    routing = UniformRouting(mesh=case.mesh, num_tokens=1, top_k=case.k, num_experts=case.num_experts)
    return traffic_of(there(program, case.routing), routing, _ONE).inter_bytes


def exchange_s(
    program: str, routing: RoutedTokens, row_bytes: int, links: Links | None, machine: Machine | None = None
) -> float:
    """Seconds of a dispatch, its collectives one after the other; `links` None: all ranks share one host.

    In each the processors work while the busiest card sends; whichever takes longer counts.
    """
    machine = machine or Machine()
    total = 0.0
    for move in there(program, routing):
        pairs = pairs_of((move,), routing, row_size(row_bytes))
        if not pairs:
            # along an axis on which a rank has no peer
            continue
        messages, sent = (sum(pair[at] for pair in pairs.values()) for at in (1, 0))
        busy = routing.mesh.size * machine.call_s + messages * machine.message_s + sent * machine.byte_s
        on_link = 0.0 if links is None else _card_s(pairs, routing.mesh.local, links, machine)
        total += max(busy, on_link)
    return total


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Which of a program and `flat` is faster with small rows, and from which size of a row on the other one is."""

    small: str
    row_bytes: float | None  # None: the same one at all sizes


def planned_crossover(program: str, routing: RoutedTokens, links: Links | None, *, lead: float = 1.0) -> Crossover:
    """By planned times, for rows of 4 bytes to 16 MiB; if the program were `lead` times as fast beside flat as planned.

    On large rows two programs are often within a percent of each other, and a percent then moves the crossover far.
    """
    sizes = [1 << power for power in range(2, 25)]
    times = {name: [exchange_s(name, routing, size, links) for size in sizes] for name in ("flat", program)}
    ratios = [lead * flat / own for flat, own in zip(times["flat"], times[program], strict=True)]
    return crossover(program, list(zip(sizes, ratios, strict=True)))


def crossover(program: str, speedups: Sequence[tuple[int, float]]) -> Crossover:
    """Of (row bytes, speedup over flat) in order of size; between two sizes speedups are taken for a power law."""
    wins = speedups[0][1] >= 1
    small = program if wins else "flat"
    for (low, before), (high, after) in pairwise(speedups):
        if (after >= 1) != wins:
            share = log(before) / (log(before) - log(after))
            return Crossover(small=small, row_bytes=low * (high / low) ** share)
    return Crossover(small=small, row_bytes=None)


def _card_s(pairs: dict[tuple[int, int], list[float]], local: int, links: Links, machine: Machine) -> float:
    """What the busiest card needs for what it sends; packets of the other direction are as many."""
    by_host: dict[int, list[float]] = {}
    for (sender, receiver), (sent, messages) in pairs.items():
        if sender // local != receiver // local:
            card = by_host.setdefault(sender // local, [0.0, 0.0])
            card[0] += _packets(sent, messages, links.mtu, machine)
            card[1] += sent + 3 * _GLOO_HEADER * messages
    if not by_host:
        return 0.0
    round_trip_s = 2e-3 * links.delay_ms
    if not links.rate_mbit:
        return round_trip_s
    bytes_per_s = links.bytes_per_s
    wire_s = max(
        packets * (links.packet_us * 1e-6 + _HEADERS / bytes_per_s) + sent / bytes_per_s
        for packets, sent in by_host.values()
    )
    # what the token bucket lets through at once
    return max(0.0, wire_s - links.burst_bytes / bytes_per_s) + round_trip_s


def _packets(sent: float, messages: float, mtu: int, machine: Machine) -> float:
    """Packets of so many messages; of what fills several, every second one is acknowledged."""
    if not messages:
        return 0.0
    further = max(0, ceil((sent / messages + _GLOO_HEADER) / (mtu - _IN_MTU)) - 1)
    return messages * (machine.packets + 1.5 * further)
