"""Routers: one file and one row each. A class here holds settings; `build(dim, num_experts)` makes the module."""

from turnout.routers.deepseek_v3 import DeepSeekV3
from turnout.routers.gshard import GShardTop2
from turnout.routers.hash import Hash
from turnout.routers.switch import Switch
from turnout.routers.topk import TopK

__all__ = ["DeepSeekV3", "GShardTop2", "Hash", "Switch", "TopK"]
