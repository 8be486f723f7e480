"""Parallelism applied to a model from outside, from a `Strategy`; the model itself never knows the machine."""

from turnout.parallel.apply import apply
from turnout.parallel.boxes import Layout
from turnout.parallel.build import build
from turnout.parallel.expert_parallel import ExpertParallel
from turnout.parallel.gradients import reduce_gradients
from turnout.parallel.layout import Parallel
from turnout.parallel.moves import move_bytes, moved, placements_of
from turnout.parallel.replicas import check_replicas
from turnout.parallel.shards import Shards
from turnout.parallel.stage_cut import cut_of
from turnout.parallel.stage_gather import of_stages
from turnout.parallel.stage_pass import MicroBatch
from turnout.parallel.stage_schedules import check_micro_batches
from turnout.parallel.supported import check_shards, check_supported
from turnout.parallel.tensor_parallel import check_dense, check_sequences
from turnout.parallel.tokens import cutting

__all__ = [
    "ExpertParallel",
    "Layout",
    "MicroBatch",
    "Parallel",
    "Shards",
    "apply",
    "build",
    "check_dense",
    "check_micro_batches",
    "check_replicas",
    "check_sequences",
    "check_shards",
    "check_supported",
    "cut_of",
    "cutting",
    "move_bytes",
    "moved",
    "of_stages",
    "placements_of",
    "reduce_gradients",
]
