"""Whatever two things are asked for together, training steps equal one process."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.distributed.alone import assert_trains_like_one_process
from tests.distributed.cases import TrainCase
from tests.distributed.crossed import crossed_trainings, few_trainings, pairs_left
from tests.distributed.pairs import Pair, all_pairs, crossed, pairs_of
from tests.distributed.ranks import run_crossed_trainings, run_few_trainings, spawn

STAGED = ("gpipe", "1f1b", "interleaved", "zero_bubble")
# of two settings the values that exclude each other on four ranks: each is refused, or has no ranks to lie on
EXCLUDED = [
    ("ep", "4", "slices", ("2", "4")),
    ("ep", "2", "slices", ("4",)),
    ("ep", "4", "stages", STAGED),
    ("slices", "4", "stages", STAGED),
    ("micro-batches", "1", "stages", ("1f1b",)),
    ("program", "coordinated", "tensor", ("whole tokens", "shares of tokens", "sequence parallel", "behind products")),
    ("tensor", "whole tokens", "slices", ("2", "4")),
    ("tensor", "sequence parallel", "stages", STAGED),
    ("tensor", "behind products", "stages", STAGED),
    ("stages", "zero_bubble", "tensor", ("whole tokens", "shares of tokens")),
    ("stages", "zero_bubble", "shards", ("zero-3", "of two")),
    ("sums", "once", "shards", ("none",)),
    ("sums", "once", "stages", STAGED),
]


def test_every_two_values_of_two_settings_meet_but_those_that_exclude_each_other() -> None:
    excluded: set[Pair] = {
        frozenset(((one, value), (other, each))) for one, value, other, values in EXCLUDED for each in values
    }
    assert pairs_left() == excluded


def test_pairs_are_drawn_alike_and_all_met_where_everything_is_legal() -> None:
    def goes(drawn: dict[str, str]) -> bool:
        return (drawn["a"], drawn["b"]) != ("1", "x")

    values = {"a": ("1", "2"), "b": ("x", "y", "z"), "c": ("p", "q")}
    first, second = (list(crossed(values, goes)) for _ in range(2))
    assert first == second
    assert all(goes(drawn) for drawn in first)
    met = set[Pair]().union(*map(pairs_of, first))
    assert set(all_pairs(values)) - met == {frozenset((("a", "1"), ("b", "x")))}
    assert len(first) < len(list(product(*values.values()))) - 2, "as many as all of them"


def assert_all_train_like_one_process(cases: Iterable[TrainCase], folder: Path) -> None:
    found = [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]
    for case in cases:
        assert_trains_like_one_process(case, [of_rank[case.name] for of_rank in found])


def test_some_of_what_is_asked_for_together_trains_like_one_process(tmp_path: Path) -> None:
    spawn(run_few_trainings, 4, tmp_path)
    assert_all_train_like_one_process(few_trainings(), tmp_path)


@pytest.mark.exhaustive
def test_any_two_things_asked_for_together_train_like_one_process(tmp_path: Path) -> None:
    spawn(run_crossed_trainings, 4, tmp_path)
    assert_all_train_like_one_process(crossed_trainings(), tmp_path)
