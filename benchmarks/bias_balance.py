"""How even DeepSeek-V3's biases keep the load of `tiny`, without any auxiliary loss.

Usage: python -m benchmarks.bias_balance [--steps 300] [--seeds 3] [--update sign] [--rate 0.01] [--k 8] > RESULT.json

Max violation is the greatest load over the fair share, minus 1, of the worst layer. A step of `tiny` has 4,096 tokens,
of files that repeat themselves: its own violation says more of the files than of the biases. So loads are counted over
windows of 50 steps (205 thousand tokens), and beside them per step; and after training, when no bias moves any more, on
a million tokens of training text in another order and on validation text.
Source: Wang et al. 2024, arXiv:2408.15664, which counts over a validation set (MaxVio global) and over batches.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turnout.cache import default_cache
from turnout.data.prepare import Dataset, prepare
from turnout.data.sampler import Batch, Sampler, validation_batches
from turnout.models import Decoder
from turnout.observe.balance import load_over_fair
from turnout.observe.run_folder import read_run
from turnout.routers import DeepSeekV3
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.routing_facts import routing_facts
from turnout.train.signals import StopRequest

WINDOW = 50  # steps whose loads are counted together
AT_REST = 256  # batches of training text, after training
OTHER_ORDER = 1000  # added to the seed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training run."""

    seed: int
    steps: int
    windows: list[float]  # worst layer's max violation over each window of steps, in order
    per_step: list[float]  # the mean over the steps of each window of a step's own, worst layer
    at_rest: float  # worst layer's after training, on a million tokens of training text
    validation: float  # the same on validation text
    val_loss: float | None  # nats a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--update", choices=("sign", "error"), default="sign")
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--k", type=int, default=8)
    asked = parser.parse_args()
    router = DeepSeekV3(k=asked.k, bias_step=asked.rate, bias_update=asked.update)
    recipe = _recipe(router, asked.steps)
    dataset = prepare(recipe.data, default_cache(), say=lambda line: print(line, file=sys.stderr))
    rows = []
    for seed in range(asked.seeds):
        row = run(replace(recipe, seed=seed), dataset)
        print(row, file=sys.stderr, flush=True)
        rows.append(asdict(row))
    print(
        json.dumps({"command": " ".join(["python -m benchmarks.bias_balance", *sys.argv[1:]]), "rows": rows}, indent=1)
    )


def run(recipe: Recipe, dataset: Dataset) -> Row:
    """Train and measure."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, dataset, Path(folder))
        trainer.train(StopRequest())
        summary = trainer.finish()
        trace = read_run(Path(folder)).trace
    loop, size = recipe.loop, np.array(trace.num_experts)
    again = Sampler(dataset.train, loop.batch_size, loop.seq_len, seed=recipe.seed + OTHER_ORDER)
    train_text = (again.next_batch() for _ in range(AT_REST))
    val_text = validation_batches(dataset.val, loop.batch_size, loop.seq_len, loop.eval_tokens)
    counts = np.split(np.concatenate(trace.counts, axis=1).astype(np.int64), range(WINDOW, len(trace.steps), WINDOW))
    return Row(
        seed=recipe.seed,
        steps=loop.steps,
        windows=[_violation(window.sum(axis=0, keepdims=True), size) for window in counts],
        per_step=[_violation(window, size) for window in counts],
        at_rest=_violation_on(trainer.model, train_text),
        validation=_violation_on(trainer.model, val_text),
        val_loss=summary["val_loss"],
    )


def _violation_on(model: Decoder, batches: Iterable[Batch]) -> float:
    facts = routing_facts(model, batches)
    assert facts is not None
    return facts.max_violation_worst


def _violation(counts: NDArray[np.int64], num_experts: NDArray[np.int64]) -> float:
    """Max violation of each row of [steps, experts of all layers], the worst layer's; the mean over rows."""
    starts = np.cumsum(num_experts) - num_experts
    by_layer = np.maximum.reduceat(load_over_fair(counts, num_experts), starts, axis=-1) - 1
    return float(by_layer.max(axis=-1).mean())


def _recipe(router: DeepSeekV3, steps: int) -> Recipe:
    recipe = load_recipe("tiny", [f"loop.steps={steps}", "loop.eval_every=0"])
    assert recipe.model.moe is not None
    return replace(recipe, model=replace(recipe.model, moe=replace(recipe.model.moe, router=router, losses=())))


if __name__ == "__main__":
    main()
