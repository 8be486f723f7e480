"""Recipes side by side: the same text and wall-clock budget, in turns, so that the machine's moods are shared."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turnout.data.prepare import Dataset
from turnout.errors import ConfigError
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest

TURNS = 24  # turns each recipe gets; after each one it is evaluated


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One recipe, one seed: validation loss after each turn."""

    recipe: str
    seed: int
    seconds: tuple[float, ...]  # training clock
    tokens: tuple[int, ...]
    val_loss: tuple[float, ...]
    tokens_per_s: float
    params_total: int
    params_active: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A recipe against the baseline, the last recipe of the comparison, over the same seeds."""

    recipe: str
    baseline: str
    margin: float  # baseline's final loss minus this one's, nats, mean over seeds; above 0: better
    margins: tuple[float, ...]  # seed by seed
    time_ratio: float | None  # share of the baseline's time to reach its final loss, worst seed; None: not reached
    break_even_s: float | None  # from this training second on it stays ahead, worst seed; None: it does not


def compare(
    recipes: Sequence[Recipe],
    dataset: Dataset,
    out: Path,
    *,
    minutes: float,
    seeds: Sequence[int],
    stop: StopRequest,
    say: Callable[[str], None],
) -> list[Curve]:
    """Train every recipe for the budget at every seed, in turns; run folders go to OUT/RECIPE-seed-N.

    Raises: ConfigError if the recipes do not read the same data; a stop request ends after saving every run.
    """
    check_comparable(recipes)
    curves: list[Curve] = []
    for seed in seeds:
        trainers = [_trainer(recipe, dataset, out, minutes, seed) for recipe in recipes]
        curves += _take_turns(trainers, minutes, stop, say)
        if stop.requested:
            break
    return curves


def check_comparable(recipes: Sequence[Recipe]) -> None:
    """Raises: ConfigError if the recipes differ in data or evaluation."""
    first = recipes[0]
    for other in recipes[1:]:
        if other.data != first.data or other.loop.eval_tokens != first.loop.eval_tokens:
            raise ConfigError(
                f"{other.name} and {first.name} do not use the same data or evaluation text; "
                "a comparison needs equal [data] tables and loop.eval_tokens"
            )


def verdicts(curves: Sequence[Curve]) -> list[Verdict]:
    """Every recipe against the last one; empty when there are fewer than two."""
    names = list(dict.fromkeys(curve.recipe for curve in curves))
    if len(names) < 2:
        return []
    baseline = {c.seed: c for c in curves if c.recipe == names[-1]}
    return [
        _verdict(name, [(c, baseline[c.seed]) for c in curves if c.recipe == name and c.seed in baseline])
        for name in names[:-1]
    ]


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
    """First turn's second from which `curve` is below `baseline` at every later turn."""
    behind = [a >= b for a, b in zip(curve.val_loss, baseline.val_loss, strict=True)]
    if behind[-1]:
        return None
    last_behind = max((i for i, value in enumerate(behind) if value), default=-1)
    return curve.seconds[last_behind + 1]


def _verdict(name: str, pairs: Sequence[tuple[Curve, Curve]]) -> Verdict:
    margins = tuple(base.val_loss[-1] - mine.val_loss[-1] for mine, base in pairs)
    reached = [(seconds_to(mine, base.val_loss[-1]), base.seconds[-1]) for mine, base in pairs]
    ratios = [None if s is None else s / total for s, total in reached]
    evens = [ahead_from(mine, base) for mine, base in pairs]
    return Verdict(
        recipe=name,
        baseline=pairs[0][1].recipe,
        margin=statistics.fmean(margins),
        margins=margins,
        time_ratio=_worst(ratios),
        break_even_s=_worst(evens),
    )


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _trainer(recipe: Recipe, dataset: Dataset, out: Path, minutes: float, seed: int) -> Trainer:
    # evaluation happens between turns, at the same moments for all
    loop = replace(recipe.loop, steps=0, minutes=minutes, eval_every=0, save_every=0)
    return Trainer(replace(recipe, seed=seed, loop=loop), dataset, out / f"{recipe.name}-seed-{seed}")


def _take_turns(
    trainers: Sequence[Trainer], minutes: float, stop: StopRequest, say: Callable[[str], None]
) -> list[Curve]:
    points: list[list[tuple[float, int, float]]] = [[] for _ in trainers]
    for turn in range(1, TURNS + 1):
        for trainer, seen in zip(trainers, points, strict=True):
            trainer.train(stop, pause_at_s=60 * minutes * turn / TURNS)
            trainer.evaluate_and_record(stop)
            c = trainer.counters
            if not stop.requested and c.val_loss is not None:
                seen.append((c.seconds, c.tokens, c.val_loss))
        if stop.requested:
            break
        scores = ", ".join(f"{t.recipe.name} {t.counters.val_loss:.4f}" for t in trainers)
        say(f"{trainers[0].counters.seconds / 60:5.1f} min  seed {trainers[0].recipe.seed}  {scores}")
    for trainer in trainers:
        trainer.recorder.close() if stop.requested else trainer.finish()
    # a stop in the middle of a turn leaves some with a point more
    turns = min(len(seen) for seen in points)
    return [_curve(trainer, seen[:turns]) for trainer, seen in zip(trainers, points, strict=True)] if turns else []


def _curve(trainer: Trainer, points: Sequence[tuple[float, int, float]]) -> Curve:
    summary = trainer.summary()
    return Curve(
        recipe=trainer.recipe.name,
        seed=trainer.recipe.seed,
        seconds=tuple(p[0] for p in points),
        tokens=tuple(p[1] for p in points),
        val_loss=tuple(p[2] for p in points),
        tokens_per_s=summary["tokens_per_s"],
        params_total=summary["params_total"],
        params_active=summary["params_active"],
    )
