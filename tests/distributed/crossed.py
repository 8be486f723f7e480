"""Training steps in which everything a strategy can say meets everything else, two by two."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from tests.distributed.cases import TrainCase
from tests.distributed.pairs import Drawn, Pair, all_pairs, crossed, pairs_of
from turnout.comm import expert_mesh
from turnout.dispatch import FixedCapacity
from turnout.errors import ConfigError
from turnout.parallel.stage_schedules import check_micro_batches
from turnout.parallel.supported import check_shards, check_supported

_DROPPING = FixedCapacity(factor=1.0, in_decoder="allow")
AXES: dict[str, dict[str, dict[str, Any]]] = {
    "stages": {
        "one": {},
        "gpipe": {"pp": 2, "schedule": "gpipe"},
        "1f1b": {"pp": 2},
        "interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
        "zero_bubble": {"pp": 2, "schedule": "zero_bubble"},
    },
    "tensor": {
        "one": {},
        "whole tokens": {"tp": 2, "attention": "all"},
        "shares of tokens": {"tp": 2, "attention": "all", "shard_tokens": True},
        "sequence parallel": {"tp": 2, "attention": "all", "sequence_parallel": True},
        "behind products": {"tp": 2, "attention": "all", "sequence_parallel": True, "tp_overlap": 2},
    },
    "ep": {"1": {"ep": 1}, "2": {"ep": 2}, "4": {"ep": 4}},
    "slices": {"1": {}, "2": {"etp": 2}, "4": {"etp": 4}},
    "axes": {"apart": {}, "folded": {"folded": True}},
    "shards": {"none": {}, "zero-3": {"zero": 3}, "of two": {"zero": 3, "zero_size": 2}},
    "sums": {"each": {}, "once": {"zero_sum": "step"}},
    "micro-batches": {"1": {}, "2": {"accumulate": 2}, "4": {"accumulate": 4}},
    "optimizer": {"sgd": {}, "adamw": {"adam": True}},
    "program": {
        name: {"program": name} for name in ("flat", "hierarchical", "node_dedup", "rank_dedup", "coordinated")
    },
    "r": {"all": {}, "1": {"adaptive_r": 1}, "0": {"adaptive_r": 0}},
    "chunks": {"1": {}, "2": {"overlap": 2}, "4": {"overlap": 4}, "8": {"overlap": 8}},
    "packing": {
        "ragged": {},
        "padded": {"capacity": _DROPPING, "backend": "padded_bmm"},
        "dropping": {"capacity": _DROPPING, "backend": "loop"},
    },
    "node": {"4": {}, "2": {"local": 2}},
    "experts": {"8": {}, "6": {"num_experts": 6}},
    "precision": {"float64": {}, "float32": {"dtype": torch.float32}},
    "text": {"all": {}, "not the last": {"idle_rank": True}},
}
_FEW = 4
NAMES = {axis: tuple(values) for axis, values in AXES.items()}


def case_of(drawn: Drawn) -> TrainCase:
    """Raises: ConfigError if a strategy cannot even be written so."""
    settings = {name: value for axis, each in drawn.items() for name, value in AXES[axis][each].items()}
    # next to it a gradient's scale shows in the step, and one of 1e-9 is not all rounding errors of float32
    case = TrainCase(bias=True, adam_eps=1e-3, **settings)
    _ = case.strategy
    return case


def is_legal(drawn: Drawn) -> bool:
    """Whether nothing refuses the case: neither the strategy itself, nor what applies it, nor the schedule."""
    try:
        case = case_of(drawn)
        strategy = case.strategy.check(case.ranks, num_experts=case.num_experts, num_layers=4, uneven=True)
        check_supported(strategy)
        check_shards(strategy, has_experts=True)
        check_micro_batches(strategy, case.accumulate)
        apart = 1 if strategy.folded or strategy.tokens_sharded else strategy.tp
        expert_mesh(strategy.etp, case.local, "etp")
        expert_mesh(strategy.ep, max(1, case.local // (strategy.etp * apart)))
    except ConfigError:
        return False
    return True


def crossed_trainings() -> Iterator[TrainCase]:
    """The same ones everywhere; the first have most pairs that those before them had not."""
    return (case_of(drawn) for drawn in crossed(NAMES, is_legal))


def few_trainings() -> list[TrainCase]:
    """The first ones."""
    return list(islice(crossed_trainings(), _FEW))


def pairs_left() -> set[Pair]:
    """Pairs that no case has."""
    met = {pair for drawn in crossed(NAMES, is_legal) for pair in pairs_of(drawn)}
    return set(all_pairs(NAMES)) - met
