"""Capacity, permutation and combination of rows: local and pure, no communication."""

from turnout.dispatch.affinity import AffinityThreshold
from turnout.dispatch.capacity import Dropless, FixedCapacity
from turnout.dispatch.combine import combine
from turnout.dispatch.permute import pack, plan_dispatch, unpack
from turnout.dispatch.queue import arrival_order, queue_position
from turnout.dispatch.tutel import TutelCapacity

__all__ = [
    "AffinityThreshold",
    "Dropless",
    "FixedCapacity",
    "TutelCapacity",
    "arrival_order",
    "combine",
    "pack",
    "plan_dispatch",
    "queue_position",
    "unpack",
]
