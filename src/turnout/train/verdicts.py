"""Which recipe of a comparison won, by how much and from when on."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from turnout.train.compare import Curve


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A recipe against the baseline, the last recipe of the comparison, over the seeds both brought to the end."""

    recipe: str
    baseline: str
    margin: float  # baseline's final loss minus this one's, nats, mean over seeds; above 0: better
    margins: tuple[float, ...]  # seed by seed
    time_ratio: float | None  # share of the baseline's time to reach its final loss, worst seed; None: not reached
    # from this training second of these runs on it stays ahead, worst seed; None: it does not. No budget: a run of that
    # length would have had another schedule
    ahead_from_s: float | None


def verdicts(curves: Sequence[Curve], baseline: str = "") -> list[Verdict]:
    """Every recipe against `baseline`, where both have a seed brought to the end; a schedule cut short has no end.

    baseline: a recipe's name; empty: the last curve's. One that has no curve is nobody's baseline: there is no verdict.
    """
    names = list(dict.fromkeys(curve.recipe for curve in curves))
    whole = [curve for curve in curves if curve.complete]
    against = baseline or names[-1]
    base = {c.seed: c for c in whole if c.recipe == against}
    pairs = {
        name: [(c, base[c.seed]) for c in whole if c.recipe == name and c.seed in base]
        for name in names
        if name != against
    }
    return [_verdict(name, found) for name, found in pairs.items() if found]


def seconds_to(curve: Curve, loss: float) -> float | None:
    """Training second at which the curve first reaches `loss`, interpolated between evaluations."""
    before_s, before = 0.0, math.inf
    for second, value in zip(curve.seconds, curve.val_loss, strict=True):
        if value <= loss:
            share = 1.0 if math.isinf(before) else (before - loss) / max(before - value, 1e-12)
            return before_s + share * (second - before_s)
        before_s, before = second, value
    return None


def ahead_from(curve: Curve, baseline: Curve) -> float | None:
    """First round's second from which `curve` is below `baseline` at every later round."""
    behind = [a >= b for a, b in zip(curve.val_loss, baseline.val_loss, strict=True)]
    if behind[-1]:
        return None
    last_behind = max((i for i, value in enumerate(behind) if value), default=-1)
    return curve.seconds[last_behind + 1]


def _verdict(name: str, pairs: Sequence[tuple[Curve, Curve]]) -> Verdict:
    margins = tuple(base.val_loss[-1] - mine.val_loss[-1] for mine, base in pairs)
    reached = [(seconds_to(mine, base.val_loss[-1]), base.seconds[-1]) for mine, base in pairs]
    ratios = [None if s is None else s / total for s, total in reached]
    leads = [ahead_from(mine, base) for mine, base in pairs]
    return Verdict(
        recipe=name,
        baseline=pairs[0][1].recipe,
        margin=statistics.fmean(margins),
        margins=margins,
        time_ratio=_worst(ratios),
        ahead_from_s=_worst(leads),
    )


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None
