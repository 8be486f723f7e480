"""What a step means for the run: a spike, a step left out, or its end."""

from dataclasses import dataclass

from turnout.observe.spikes import SpikeRule, is_spike
from turnout.train.progress import Counters
from turnout.train.recipe import LoopConfig
from turnout.train.step import StepResult

SPIKE = SpikeRule()


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of one step."""

    news: str = ""  # what a person should know; empty: nothing
    goes_on: bool = True
    weights_are_good: bool = True


def judged(counters: Counters, result: StepResult, loop: LoopConfig) -> Judgement:
    """A step by the run's policy; the counters learn of it: losses, and how many steps in a row were left out."""
    if result.problem is None:
        counters.skipped_in_a_row, before = 0, counters.train_loss
        counters.train_loss = result.loss if before is None else 0.95 * before + 0.05 * result.loss
        spiked, counters.losses = is_spike(SPIKE, counters.losses, result.loss)
        return Judgement(news=f"loss spike: {result.loss:.4f}" if spiked else "")
    counters.skipped_in_a_row += 1
    weights_are_good = not result.problem.startswith("weight")
    skips = loop.nonfinite == "skip" and weights_are_good and counters.skipped_in_a_row <= loop.max_skipped
    news = f"not finite, update left out: {result.problem}"
    return Judgement(news=news, goes_on=skips, weights_are_good=weights_are_good)
