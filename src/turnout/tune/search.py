"""The search for the fastest choice: pure functions over times, so that ranks that see the same decide the same.

Candidates that the prediction does not rule out are measured in turn, one step each, and the promising ones again, as
often as `Rules.trials`. From then on the fastest is taken, and goes on being measured. A time is kept as its ratio to
the prediction for that very step, for within a key the rows of steps differ; ratios are compared by their medians, so
that a step that something else held up decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from turnout.errors import ConfigError
from turnout.tune.choice import Choice

Predicted = Mapping[Choice, float]  # seconds of a step


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When to try, to settle and to begin anew."""

    prune: float = 3.0  # predicted to take so many times the best predicted: never tried
    most: int = 16  # candidates tried at most
    keep: float = 1.3  # measured at so many times the best: not tried again (squared, after a single step)
    trials: int = 3  # steps that each of the others is measured in
    window: int = 15  # last times of a choice that count
    drift: float = 1.5  # a time off its record by this factor, either way
    patience: int = 5  # and for so many steps in a row: the search begins anew

    def __post_init__(self) -> None:
        for name in ("prune", "keep", "drift"):
            if getattr(self, name) <= 1:
                raise ConfigError(f"rules.{name}={getattr(self, name)} must be above 1")
        for name in ("most", "trials", "window", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rules.{name}={getattr(self, name)} must be at least 1; nearest legal: 1")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What steps with one choice took."""

    ratios: tuple[float, ...]  # measured over predicted seconds, the last ones
    steps: int  # all of them

    @property
    def ratio(self) -> float:
        """The record: what a prediction is multiplied by."""
        return median(self.ratios)

    def and_also(self, ratio: float, window: int) -> "Trial":
        """With one step more."""
        return Trial(ratios=(*self.ratios, ratio)[-window:], steps=self.steps + 1)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of the steps of one key."""

    trials: Mapping[Choice, Trial] = field(default_factory=dict)
    predicted: Predicted = field(default_factory=dict)  # for the last of the steps
    off: int = 0  # steps in a row whose time was off the record
    searches: int = 1  # times it was searched

    def times(self, predicted: Predicted) -> dict[Choice, float]:
        """Seconds of what was tried, as if every step had been one with this prediction."""
        return {choice: self.trials[choice].ratio * predicted[choice] for choice in predicted if choice in self.trials}


def tried(predicted: Predicted, rules: Rules) -> list[Choice]:
    """The candidates worth a step, in the order of their trials: first the best of each r, then the best of all."""
    best = min(predicted.values())
    order = sorted(predicted, key=lambda choice: (predicted[choice], choice))
    near = [choice for choice in order if predicted[choice] <= rules.prune * best]
    leaders: dict[int, Choice] = {}
    for choice in near:
        leaders.setdefault(choice.adaptive_r, choice)
    return list(dict.fromkeys([*leaders.values(), *near]))[: rules.most]


def choose(entry: Entry, predicted: Predicted, rules: Rules) -> Choice:
    """What the next step should take: a candidate not yet measured often enough, else the fastest."""
    open_trials = _open_trials(entry, predicted, rules)
    if open_trials:
        return open_trials[0]
    times = entry.times(predicted)
    return min(tried(predicted, rules), key=lambda choice: (times[choice], choice))


def is_warm(entry: Entry, predicted: Predicted, rules: Rules) -> bool:
    """Whether nothing is left to try."""
    return not _open_trials(entry, predicted, rules)


def observed(entry: Entry, choice: Choice, predicted: Predicted, seconds: float, rules: Rules) -> Entry:
    """The entry after a step with `choice` that took so long on the slowest rank."""
    ratio, trial = seconds / predicted[choice], entry.trials.get(choice)
    if trial is None:
        return _with(entry, choice, Trial(ratios=(ratio,), steps=1), predicted)
    off = max(ratio / trial.ratio, trial.ratio / ratio)
    if trial.steps < rules.trials or off <= rules.drift:
        return _with(entry, choice, trial.and_also(ratio, rules.window), predicted)
    if entry.off + 1 < rules.patience:
        # one that is off is not kept: it is an accident, or the first of a new time
        return replace(entry, off=entry.off + 1)
    anew = Trial(ratios=(ratio,), steps=1)
    return Entry(trials={choice: anew}, predicted=dict(predicted), searches=entry.searches + 1)


def _open_trials(entry: Entry, predicted: Predicted, rules: Rules) -> list[Choice]:
    """What is to be measured still, first what was least."""
    times = entry.times(predicted)
    best = min(times.values(), default=0.0)
    steps = {choice: entry.trials[choice].steps for choice in times}
    left = [choice for choice in tried(predicted, rules) if steps.get(choice, 0) < rules.trials]
    # one slow step may be an accident: a second one is given more easily than a third
    promising = [
        choice for choice in left if choice not in times or times[choice] <= best * rules.keep ** (2 / steps[choice])
    ]
    return sorted(promising, key=lambda choice: steps.get(choice, 0))


def _with(entry: Entry, choice: Choice, trial: Trial, predicted: Predicted) -> Entry:
    return replace(entry, trials={**entry.trials, choice: trial}, predicted=dict(predicted), off=0)
