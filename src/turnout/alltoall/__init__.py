"""All-to-all programs, one a file, over the Transport of `transport.py`; PROGRAMS lists them. Never imports torch."""

from turnout.alltoall.coordinated import coordinated
from turnout.alltoall.counting import CountingTransport, Move, round_trip
from turnout.alltoall.expected import LoadedRouting, UniformRouting, expected_distinct
from turnout.alltoall.flat import flat
from turnout.alltoall.hierarchical import hierarchical
from turnout.alltoall.itinerary import Block, Leg, itinerary
from turnout.alltoall.loopback import LoopbackTransport
from turnout.alltoall.loopback_rows import Rows, load, token_sums
from turnout.alltoall.node_dedup import node_dedup
from turnout.alltoall.rank_dedup import rank_dedup
from turnout.alltoall.routed import RoutedTokens
from turnout.alltoall.traffic import Routing, RowSize, Traffic, pairs_of, traffic_of
from turnout.alltoall.transport import (
    PROGRAMS,
    Axis,
    Finer,
    Merged,
    Packing,
    Program,
    Step,
    Transport,
    combine,
    dispatch,
    steps_of,
)

__all__ = [
    "PROGRAMS",
    "Axis",
    "Block",
    "CountingTransport",
    "Finer",
    "Leg",
    "LoadedRouting",
    "LoopbackTransport",
    "Merged",
    "Move",
    "Packing",
    "Program",
    "RoutedTokens",
    "Routing",
    "RowSize",
    "Rows",
    "Step",
    "Traffic",
    "Transport",
    "UniformRouting",
    "combine",
    "coordinated",
    "dispatch",
    "expected_distinct",
    "flat",
    "hierarchical",
    "itinerary",
    "load",
    "node_dedup",
    "pairs_of",
    "rank_dedup",
    "round_trip",
    "steps_of",
    "token_sums",
    "traffic_of",
]
