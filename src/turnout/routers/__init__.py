"""Routers: one file and one row each. A class here holds settings; `build(dim, num_experts)` makes the module."""

from turnout.routers.base import BASE
from turnout.routers.cosine import Cosine
from turnout.routers.deepseek_v3 import DeepSeekV3
from turnout.routers.device_limited import DeviceLimited
from turnout.routers.expert_choice import ExpertChoice
from turnout.routers.forced import Forced
from turnout.routers.gshard import GShardTop2
from turnout.routers.hash import Hash
from turnout.routers.hierarchical import Hierarchical
from turnout.routers.locmoe import LocMoE
from turnout.routers.locmoe_plus import LocMoEPlus
from turnout.routers.noisy_topk import NoisyTopK
from turnout.routers.quantile import Quantile
from turnout.routers.remoe import ReMoE
from turnout.routers.replay import Replay, recording_of
from turnout.routers.sinkhorn import Sinkhorn
from turnout.routers.switch import Switch
from turnout.routers.top_p import TopP
from turnout.routers.topk import TopK

__all__ = [
    "BASE",
    "Cosine",
    "DeepSeekV3",
    "DeviceLimited",
    "ExpertChoice",
    "Forced",
    "GShardTop2",
    "Hash",
    "Hierarchical",
    "LocMoE",
    "LocMoEPlus",
    "NoisyTopK",
    "Quantile",
    "ReMoE",
    "Replay",
    "Sinkhorn",
    "Switch",
    "TopK",
    "TopP",
    "recording_of",
]
