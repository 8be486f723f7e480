"""Ranks share out the validation text: together they take every batch of it once."""

from typing import Any, cast

import pytest
import torch

from turnout.data.prepare import Dataset
from turnout.models import Decoder
from turnout.parallel import Parallel
from turnout.train.device import autocast_for
from turnout.train.evaluate import mean_loss
from turnout.train.recipe import Recipe


class Alone:
    """A rank of many whose sums are its own: what a job's ranks would add up is added up here."""

    def __init__(self, rank: int, size: int) -> None:
        self.text_place = (rank, size)
        self.world = self
        self.stages = None
        self.sums: list[float] = []

    def largest(self, values: list[float]) -> list[float]:
        return values

    def total(self, values: list[float]) -> list[float]:
        self.sums = values
        return values

    def own_targets(self, targets: torch.Tensor) -> torch.Tensor:
        return targets


def sums(recipe: Recipe, dataset: Dataset, rank: int, size: int) -> list[float]:
    """Sum of losses and number of targets of one rank, over five batches of two sequences."""
    torch.manual_seed(0)
    alone = Alone(rank, size)
    loop = recipe.loop
    mean_loss(
        Decoder(recipe.model),
        dataset.val,
        batch_size=loop.batch_size,
        seq_len=loop.seq_len,
        max_tokens=5 * loop.batch_size * loop.seq_len,
        parallel=cast(Parallel, cast(Any, alone)),
        autocast=autocast_for(torch.device("cpu"), torch.float32),
    )
    return alone.sums


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_take_every_batch_of_the_text_once(size: int, small_recipe: Recipe, small_dataset: Dataset) -> None:
    whole = sums(small_recipe, small_dataset, 0, 1)
    each = [sums(small_recipe, small_dataset, rank, size) for rank in range(size)]
    assert whole[1] == 5 * small_recipe.loop.batch_size * small_recipe.loop.seq_len
    assert sum(count for _, count in each) == whole[1]
    assert sum(loss for loss, _ in each) == pytest.approx(whole[0], rel=1e-6)
