"""Recipes side by side: the same text and wall-clock budget, in turns, so that the machine's moods are shared."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from turnout.data.prepare import Dataset
from turnout.data.sampler import validation_batches
from turnout.errors import ConfigError, NonFiniteError
from turnout.models.size import sizes
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.routing_facts import RoutingFacts, routing_facts
from turnout.train.routing_setup import RoutingSetup, routing_setup
from turnout.train.signals import StopRequest

ROUNDS = 24  # after each one every recipe is evaluated
TURNS = 5  # turns each recipe gets in a round: short ones, so that a busy minute of the machine is everybody's


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One recipe, one seed: validation loss after each round."""

    recipe: str
    seed: int
    seconds: tuple[float, ...]  # training clock
    tokens: tuple[int, ...]
    val_loss: tuple[float, ...]
    tokens_per_s: float
    params_total: int
    params_active: int
    train_flops_per_token: int  # matrix and attention products, forward and backward
    complete: bool  # trained to the end of its budget
    cpu_share: float | None  # CPU time it got of what its threads could have had; None on other devices
    dropped_share: float  # of the last recorded step's assignments, for want of room
    declined_share: float  # the same, left out by the router or the policy
    max_violation: float  # of the last recorded step: greatest load over the fair share, minus 1
    router_entropy: float  # of the last recorded step: 1 is undecided
    routing: RoutingFacts | None  # on validation text, after training; None: no experts, or not complete
    setup: RoutingSetup | None  # None: no experts


def compare(
    recipes: Sequence[Recipe],
    dataset: Dataset,
    out: Path,
    *,
    minutes: float,
    steps: int = 0,
    seeds: Sequence[int],
    stop: StopRequest,
    say: Callable[[str], None],
    on_seed: Callable[[Sequence[Curve]], object] = lambda _: None,
) -> list[Curve]:
    """Train every recipe for the budget at every seed, in turns; run folders go to OUT/RECIPE-seed-N.

    The budget is wall clock, or, with `steps` above 0, that many steps: the same tokens where batches are equal.

    `on_seed` gets all curves so far after each seed, so that hours of work are not lost with the last of them.
    Raises: ConfigError if the recipes cannot be compared; a stop request ends after saving every run.
    """
    check_comparable(recipes)
    curves: list[Curve] = []
    for seed in seeds:
        trainers = [_trainer(recipe, dataset, out, minutes, steps, seed) for recipe in recipes]
        curves += _take_turns(trainers, stop, say)
        on_seed(curves)
        if stop.requested:
            break
    return curves


def check_comparable(recipes: Sequence[Recipe]) -> None:
    """Raises: ConfigError if two recipes have one name, or differ in data or evaluation."""
    first = recipes[0]
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the recipes have the same name ({', '.join(names)}); set `name` in their files")
    for other in recipes[1:]:
        if _evaluation(other) != _evaluation(first):
            raise ConfigError(
                f"{other.name} and {first.name} do not use the same data or evaluation text; "
                "a comparison needs equal [data] tables, loop.eval_tokens and loop.seq_len"
            )


def _evaluation(recipe: Recipe) -> tuple[object, ...]:
    # the longer the sequence, the more context a token has: losses at two lengths are two quantities
    return recipe.data, recipe.loop.eval_tokens, recipe.loop.seq_len


def _trainer(recipe: Recipe, dataset: Dataset, out: Path, minutes: float, steps: int, seed: int) -> Trainer:
    # evaluation happens between turns, at the same moments for all
    loop = replace(recipe.loop, steps=steps, minutes=minutes, eval_every=0, save_every=0)
    return Trainer(replace(recipe, seed=seed, loop=loop), dataset, out / f"{recipe.name}-seed-{seed}")


def _take_turns(trainers: Sequence[Trainer], stop: StopRequest, say: Callable[[str], None]) -> list[Curve]:
    contestants = [_Contestant(trainer) for trainer in trainers]
    running = list(contestants)
    for round in range(ROUNDS):
        for turn in range(1, TURNS + 1):
            running = [c for c in running if c.goes_on(stop, until=(round + turn / TURNS) / ROUNDS, say=say)]
        for contestant in running:
            contestant.evaluate(stop)
        if stop.requested:
            break
        scores = ", ".join(f"{c.trainer.recipe.name} {c.points[-1][2]:.4f}" for c in running)
        minutes = trainers[0].counters.seconds / 60
        say(f"{minutes:5.1f} min  seed {trainers[0].recipe.seed}  {scores}")
    for contestant in running:
        contestant.end(stop)
    return [_curve(c.trainer, c.points, c.cpu_share) for c in contestants if c.points]


class _Contestant:
    """One run of the comparison, and what its turns came to."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.points: list[tuple[float, int, float]] = []  # seconds, tokens, validation loss
        self._cpu_s = 0.0

    def goes_on(self, stop: StopRequest, *, until: float, say: Callable[[str], None]) -> bool:
        """Trains up to that share of the budget; False if it cannot."""
        started = time.process_time()
        try:
            self.trainer.train(stop, pause_at=until)
        except NonFiniteError as error:
            say(f"{self.trainer.recipe.name} seed {self.trainer.recipe.seed} ends here: {error}")
            return False
        self._cpu_s += time.process_time() - started
        return True

    def evaluate(self, stop: StopRequest) -> None:
        val_loss = self.trainer.evaluate_and_record(stop)
        if val_loss is not None and not stop.requested:
            self.points.append((self.trainer.counters.seconds, self.trainer.counters.tokens, val_loss))

    def end(self, stop: StopRequest) -> None:
        if not stop.requested:
            self.trainer.finish()
            return
        # whose turn it was has saved; the others have not
        self.trainer.save()
        self.trainer.close()

    @property
    def cpu_share(self) -> float | None:
        if self.trainer.device.type != "cpu":
            return None
        return self._cpu_s / max(self.trainer.counters.seconds * torch.get_num_threads(), 1e-9)


def _curve(trainer: Trainer, points: Sequence[tuple[float, int, float]], cpu_share: float | None) -> Curve:
    recipe = trainer.recipe
    size = sizes(recipe.model, recipe.loop.seq_len)
    seconds, tokens, val_loss = zip(*points, strict=True)
    complete = len(points) == ROUNDS
    line = trainer.line
    return Curve(
        recipe=recipe.name,
        seed=recipe.seed,
        seconds=seconds,
        tokens=tokens,
        val_loss=val_loss,
        tokens_per_s=trainer.summary()["tokens_per_s"],
        params_total=size.total,
        params_active=size.active,
        train_flops_per_token=size.train_flops_per_token,
        complete=complete,
        cpu_share=cpu_share,
        dropped_share=line.get("dropped_share", 0.0),
        declined_share=line.get("declined_share", 0.0),
        max_violation=line.get("max_violation", 0.0),
        router_entropy=line.get("router_entropy", 0.0),
        routing=_routing(trainer) if complete else None,
        setup=routing_setup(recipe),
    )


def _routing(trainer: Trainer) -> RoutingFacts | None:
    loop = trainer.recipe.loop
    batches = validation_batches(trainer.dataset.val, loop.batch_size, loop.seq_len, loop.eval_tokens)
    return routing_facts(trainer.model, [batch.to(trainer.device) for batch in batches])
