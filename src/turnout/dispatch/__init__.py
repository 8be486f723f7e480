"""Capacity, permutation and combination of rows: local and pure, no communication."""

from turnout.dispatch.capacity import Dropless, FixedCapacity
from turnout.dispatch.combine import combine
from turnout.dispatch.permute import pack, plan_dispatch, unpack

__all__ = ["Dropless", "FixedCapacity", "combine", "pack", "plan_dispatch", "unpack"]
