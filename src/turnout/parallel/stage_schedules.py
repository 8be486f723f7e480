"""torch's pipeline schedules by the names that strategies have for them, and how many micro-batches each takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from turnout.errors import ConfigError
from turnout.strategy import Strategy

Schedule = Any  # torch's PipelineScheduleSingle or PipelineScheduleMulti


@dataclass(frozen=True, kw_only=True)
class _Kind:
    make: Callable[..., Schedule]
    takes_several: bool  # stages of a rank
    takes: Callable[[int, int], bool]  # ranks, micro-batches
    legal: str  # the same in words


def _in_rounds(ranks: int, micro_batches: int) -> bool:
    return micro_batches % max(1, micro_batches // ranks) == 0


_ROUNDS = "fewer than pp of them, or a number that rounds of at least pp divide evenly"
_KINDS = {
    "gpipe": _Kind(make=ScheduleGPipe, takes_several=False, takes=lambda *_: True, legal="any number of them"),
    "1f1b": _Kind(
        make=Schedule1F1B, takes_several=False, takes=lambda ranks, number: number >= ranks, legal="at least pp of them"
    ),
    "interleaved": _Kind(make=ScheduleInterleaved1F1B, takes_several=True, takes=_in_rounds, legal=_ROUNDS),
    "zero_bubble": _Kind(make=ScheduleInterleavedZeroBubble, takes_several=True, takes=_in_rounds, legal=_ROUNDS),
}


def check_schedule(strategy: Strategy) -> None:
    """Raises: ConfigError if torch's schedule of that name is not the one that is meant."""
    if strategy.pp > 1 and strategy.schedule not in _KINDS:
        raise ConfigError(
            f"strategy.schedule={strategy.schedule!r} can be planned (turnout plan) but not trained with in this "
            f"version; legal: {', '.join(map(repr, _KINDS))}"
        )


def check_micro_batches(strategy: Strategy, number: int) -> None:
    """Raises: ConfigError if the schedule does not take so many in a step."""
    if strategy.pp == 1:
        return
    kind = _KINDS[strategy.schedule]
    if not kind.takes(strategy.pp, number):
        raise ConfigError(
            f"loop.accumulate={number} micro-batches do not fill the pipeline of strategy.pp={strategy.pp}: "
            f"{strategy.schedule!r} takes {kind.legal}; nearest legal: loop.accumulate={enough(strategy, number)} (a "
            "step is as large as before with a loop.batch_size that many times smaller), or strategy.schedule='gpipe'"
        )


def enough(strategy: Strategy, number: int) -> int:
    """The least number of micro-batches from `number` on that the schedule takes."""
    kind = _KINDS[strategy.schedule]
    return next(n for n in range(number, number + strategy.pp + 1) if kind.takes(strategy.pp, n))


def make_schedule(
    strategy: Strategy, stages: Sequence[PipelineStage], number: int, loss: Callable[..., Any] | None
) -> Schedule:
    """torch's, for so many micro-batches; without a loss it runs forward alone. Gradients are summed as they are."""
    kind = _KINDS[strategy.schedule]
    own = list(stages) if kind.takes_several else stages[0]
    return kind.make(own, n_microbatches=number, loss_fn=loss, scale_grads=False)
