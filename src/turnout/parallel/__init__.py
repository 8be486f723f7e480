"""Parallelism applied to a model from outside, from a `Strategy`; the model itself never knows the machine."""

from turnout.parallel.apply import Parallel, apply
from turnout.parallel.expert_parallel import ExpertParallel
from turnout.parallel.gradients import reduce_gradients
from turnout.parallel.layout import Layout
from turnout.parallel.replicas import check_replicas
from turnout.parallel.shards import Shards
from turnout.parallel.supported import check_shards, check_supported

__all__ = [
    "ExpertParallel",
    "Layout",
    "Parallel",
    "Shards",
    "apply",
    "check_replicas",
    "check_shards",
    "check_supported",
    "reduce_gradients",
]
