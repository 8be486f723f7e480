"""What pipeline stages do not take is one clear error; what they take is what torch's schedules take."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from turnout import MoE, Strategy
from turnout.comm import World
from turnout.errors import ConfigError
from turnout.models import Decoder
from turnout.parallel import apply, check_micro_batches, check_supported
from turnout.parallel.stage_schedules import enough
from turnout.train.estimate import memory_per_rank
from turnout.train.recipe import LoopConfig, Recipe, check_ranks
from turnout.train.recipes import load_recipe

TORCHS: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
REFUSED = [
    (
        Strategy(pp=2, tp=2, sequence_parallel=True),
        "strategy.sequence_parallel=True with pp=2 can be planned (turnout plan) but not trained with in this version",
    ),
    (
        Strategy(pp=2, tp=2, schedule="zero_bubble"),
        "strategy.schedule='zero_bubble' with tp=2: torch splits no back",
    ),
    (
        Strategy(pp=2, zero=3, zero_sum="step"),
        "strategy.zero_sum='step' with pp=2 can be planned (turnout plan) but not trained with in this version",
    ),
    (
        Strategy(pp=2, zero=3, schedule="zero_bubble"),
        "strategy.schedule='zero_bubble' with zero=3: torch splits the backward pass",
    ),
    (Strategy(pp=2, scatter_gather=True), "strategy.scatter_gather=True with pp=2 can be planned"),
    (Strategy(pp=2, schedule="dualpipe"), "strategy.schedule='dualpipe' can be planned (turnout plan) but not trained"),
]


@pytest.mark.parametrize(("strategy", "text"), REFUSED)
def test_a_strategy_this_version_does_not_train_with_is_refused(strategy: Strategy, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_supported(strategy)
    with pytest.raises(ConfigError, match=re.escape(text)):
        Recipe(strategy=strategy, loop=LoopConfig(accumulate=4))


@pytest.mark.parametrize("schedule", TORCHS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_micro_batches_that_torch_takes_are_taken(schedule: str, ranks: int) -> None:
    """Both ways: whatever the schedule refuses is refused in our words first, and nothing else."""
    several = 2 if schedule == "interleaved" else 1
    strategy = Strategy(pp=ranks, virtual_stages=several, schedule=schedule)  # pyright: ignore[reportArgumentType]
    for number in range(1, 4 * ranks):
        taken = is_taken(lambda number=number: check_micro_batches(strategy, number), ConfigError)
        assert taken == is_taken(lambda number=number: torchs(schedule, ranks, several, number), ValueError), number
        nearest = enough(strategy, number)
        assert nearest >= number
        check_micro_batches(strategy, nearest)
        assert (nearest == number) == taken


def torchs(schedule: str, ranks: int, several: int, number: int) -> object:
    """torch's schedule of stages that know their places alone."""
    places = {"group_rank": 0, "group_size": ranks, "num_stages": ranks * several, "submod": nn.Identity()}
    stages = [SimpleNamespace(**places, stage_index=index * ranks, is_last=False) for index in range(several)]
    is_single = schedule in ("gpipe", "1f1b")
    return TORCHS[schedule](stages[0] if is_single else stages, n_microbatches=number)


def is_taken(cause: Callable[[], object], error: type[Exception]) -> bool:
    try:
        cause()
    except error:
        return False
    return True


def piped(*settings: str) -> Recipe:
    return load_recipe("smoke", ["strategy.pp=2", "loop.accumulate=2", *settings])


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (
            lambda: load_recipe("smoke", ["strategy.pp=2"]),
            r"loop\.accumulate=1 micro-batches do not fill .*'1f1b' takes at least pp of them; nearest legal: loop.*=2",
        ),
        (
            lambda: piped("strategy.schedule=interleaved", "strategy.virtual_stages=2", "loop.accumulate=5"),
            r"loop\.accumulate=5 .*'interleaved' takes fewer than pp of them, or .*nearest legal: loop\.accumulate=6",
        ),
        (lambda: check_ranks(piped(), 1), r"strategy\.pp=2 needs at least 2 processes: torchrun --nproc-per-node 2"),
        (lambda: check_ranks(piped("strategy.ep=2"), 1), r"pp=2 \* ep=2 needs at least 4 processes"),
        (lambda: check_ranks(piped(), 3), r"pp=2 = 2 must divide world=3; nearest legal: pp=1, or world=4"),
        (lambda: check_ranks(piped("strategy.ep=2"), 2), r"strategy\.ep=2 must divide dp \* cp=1; nearest legal: 1"),
        (
            lambda: check_ranks(piped("strategy.pp=4", "loop.accumulate=4"), 4),
            r"strategy\.pp=4 \* virtual_stages=1 = 4 must not exceed num_layers=2; nearest legal: pp=2",
        ),
        (lambda: check_ranks(piped("loop.batch_size=3"), 4), r"batch_size=3 is that of all 2 groups of pp=2 ranks"),
        (lambda: piped("loop.compile=true"), r"loop\.compile=true with strategy\.pp=2.*nearest legal: loop\.compile="),
        (lambda: piped("loop.tune=auto"), r"loop\.tune='auto' with strategy\.pp=2: the tuner knows no such ranks"),
        (
            lambda: piped("loop.rebalance_every=100"),
            r"loop\.rebalance_every=100 with strategy\.pp=2: experts of pipeline",
        ),
        (
            lambda: apply(MoE(4, 4, 4), Strategy(pp=2), world=World(size=2, local_size=2)),
            r"strategy\.pp=2 cuts a Decoder into stages; MoE is none; nearest legal: 1",
        ),
        (
            lambda: apply(Decoder(piped().model).to("meta"), Strategy(pp=2), world=World(size=2, local_size=2)),
            r"embedding_VD is on the meta device: give the model's weights values, then apply; or build a decoder in",
        ),
        (
            lambda: apply(Decoder(piped().model), Strategy(pp=4), world=World(size=4, local_size=4)),
            r"strategy\.pp=4 \* virtual_stages=1 = 4 must not exceed num_layers=2; nearest legal: pp=2",
        ),
    ],
)
def test_what_does_not_fit_is_named(cause: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cause()


def test_a_rank_needs_memory_for_its_stages_alone() -> None:
    deep = ["model.num_layers=8", "loop.accumulate=4", "loop.batch_size=2", "loop.seq_len=8", "model.moe.hidden=512"]
    whole, staged = (
        memory_per_rank(load_recipe("smoke", [*deep, f"strategy.pp={pp}"]), 4 // (4 // pp)) for pp in (1, 4)
    )
    assert staged < 0.7 * whole
