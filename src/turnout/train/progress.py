"""Where a run stands, for its checkpoints and for whoever watches."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Counters:
    """Where a run stands; plain values, saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # training clock: steps alone, without evaluation and saving
    train_loss: float | None = None  # main loss, smoothed over about 20 steps
    val_loss: float | None = None
    evaluated_at: int = -1  # step of the last evaluation
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # what the spike rule looks back on


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a display needs after each step."""

    step: int
    done: float  # share of the run, 0 to 1
    seconds: float  # training clock
    tokens_per_s: float
    val_loss: float | None
    line: dict[str, Any]  # the step's record: loss, balance, drops
    news: tuple[str, ...]  # spikes, steps left out, checkpoints that failed, since the step before
