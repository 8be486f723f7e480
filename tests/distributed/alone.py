"""Training steps of several ranks beside the same steps of this process."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.distributed.cases import TrainCase, decoder, in_turn, optimizer, tolerance, worst
from tests.distributed.ranks import MAX_NORM, Outcome, numbers, summary
from turnout.train.device import autocast_for
from turnout.train.step import train_step


def assert_trains_like_one_process(case: TrainCase, found: Sequence[Outcome]) -> None:
    """Losses, norms, statistics and weights, on every rank and in every step; `found`: of every rank."""
    want, state = alone(case)
    limit = tolerance(case.dtype)
    for rank, got in enumerate(found):
        for step, (result, stats) in enumerate(want):
            assert worst(got["results"][step], result) <= limit, (rank, step)
            assert len(got["stats"][step]) == len(stats), (rank, step)
            for layer, numbers_ in enumerate(stats):
                assert worst(got["stats"][step][layer], numbers_) <= limit, (rank, step, layer)
    assert found[0]["state"].keys() == state.keys()
    for name, value in state.items():
        assert worst(found[0]["state"][name], value) <= limit, name
    assert all(got["begins"] for got in found), "the expert that an error names is another"
    assert not any(got["moved"] for got in found), "to change r, program or chunks moves no parameter"


def alone(case: TrainCase) -> tuple[list[tuple[Tensor, list[Tensor]]], dict[str, Any]]:
    """The same steps in this process, every rank's micro-batches one after another."""
    model = decoder(in_one_process(case))
    optim = optimizer(case, model)
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    found = []
    for step in range(case.steps):
        result = train_step(model, model.loss, optim, in_turn(case, step), max_norm=MAX_NORM, autocast=autocast)
        found.append((summary(result), [numbers(stats) for stats in result.stats]))
    return found, model.state_dict()


def in_one_process(case: TrainCase) -> TrainCase:
    """Ranks are micro-batches here, so what is counted over ranks is counted over micro-batches."""
    wide = {
        loss: replace(loss, scope="global") for loss in case.losses if getattr(loss, "scope", "") == "data_parallel"
    }
    return replace(case, losses=tuple(wide.get(loss, loss) for loss in case.losses))
