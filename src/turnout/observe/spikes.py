"""Loss spikes: one rule, for the step a training is in and for the record of a whole run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from turnout.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SpikeRule:
    """When a loss counts as a spike: more than `sigmas` standard deviations above the mean of the last steps."""

    sigmas: float = 6.0  # standard deviations above the mean
    window: int = 128  # steps the mean and deviation are taken over
    warmup: int = 32  # steps seen before the rule speaks

    def __post_init__(self) -> None:
        if not (self.sigmas > 0 and 2 <= self.warmup <= self.window):
            raise ConfigError(
                f"spike rule sigmas={self.sigmas} must be above 0, and 2 <= warmup={self.warmup} <= "
                f"window={self.window}"
            )


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step whose loss left the range of the steps before it."""

    step: int
    loss: float
    usual: float  # mean of the steps before


def is_spike(rule: SpikeRule, history: list[float], loss: float) -> tuple[bool, list[float]]:
    """Whether `loss` is a spike after `history`, and the history with it: a plain list, for a checkpoint's meta.

    A spike enters the history only up to the limit it broke, so that it does not hide the next one, yet a lasting
    change of level is accepted in time. A loss that is not finite is a spike and does not enter.
    """
    if not math.isfinite(loss):
        return True, history
    limit = _limit(rule, history) if len(history) >= rule.warmup else math.inf
    return loss > limit, [*history, min(loss, limit)][-rule.window :]


def find_spikes(steps: Sequence[float], losses: Sequence[float], rule: SpikeRule | None = None) -> tuple[Spike, ...]:
    """The spikes of a recorded run, the first step of each burst; steps without a finite loss are passed over."""
    rule, history, found, was_spike = rule or SpikeRule(), [], [], False
    for step, loss in zip(steps, losses, strict=True):
        if not math.isfinite(loss):
            continue
        before = history
        spiked, history = is_spike(rule, before, loss)
        if spiked and not was_spike:
            found.append(Spike(step=int(step), loss=loss, usual=sum(before) / len(before)))
        was_spike = spiked
    return tuple(found)


def _limit(rule: SpikeRule, history: list[float]) -> float:
    mean = sum(history) / len(history)
    # a product, not a power: of a loss near the largest float it is infinite, and no error
    square = sum([(loss - mean) * (loss - mean) for loss in history]) / len(history)
    # a loss that stood still has no deviation of its own; a thousandth of it is no spike's measure
    return mean + rule.sigmas * max(math.sqrt(square), 1e-3 * abs(mean))
