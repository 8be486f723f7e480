"""Capacity, permutation and combination of rows: local and pure, no communication."""

from turnout.dispatch.affinity import AffinityThreshold
from turnout.dispatch.capacity import Dropless, FixedCapacity
from turnout.dispatch.combine import combine
from turnout.dispatch.local import LocalDispatcher
from turnout.dispatch.permute import by_token, dealt_out, pack, plan_dispatch, reordered, unpack
from turnout.dispatch.queue import arrival_order, queue_position
from turnout.dispatch.tutel import TutelCapacity

__all__ = [
    "AffinityThreshold",
    "Dropless",
    "FixedCapacity",
    "LocalDispatcher",
    "TutelCapacity",
    "arrival_order",
    "by_token",
    "combine",
    "dealt_out",
    "pack",
    "plan_dispatch",
    "queue_position",
    "reordered",
    "unpack",
]
