"""Routers: one file and one row each. A class here holds settings; `build(dim, num_experts)` makes the module."""

from turnout.routers.gshard import GShardTop2
from turnout.routers.switch import Switch
from turnout.routers.topk import TopK

__all__ = ["GShardTop2", "Switch", "TopK"]
