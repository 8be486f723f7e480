"""How long a checkpoint holds up the steps of a run, by who writes it and whether steps go on meanwhile.

Usage: python -m benchmarks.save_stall [--hidden 512] [--saves 6] [--every 6] [--rounds 1] > RESULT.json

One process trains `tiny` with wider experts on its own text; every `--every` steps it saves weights, moments and the
rest. `held_up_s`: from the step before a save to the one after it, less a step without one. `per_save_s`: the time of
all steps with saves less that of as many without, over the saves; what writing takes from steps meanwhile counts here
alone. Ways take turns, `--rounds` times.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from turnout.cache import default_cache
from turnout.data.prepare import Dataset, prepare
from turnout.models.size import sizes
from turnout.train.loop import Trainer
from turnout.train.progress import Progress
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.signals import StopRequest

WAYS = {
    "never": {},
    "single": {"checkpoint": "single"},
    "single, beside the steps": {"checkpoint": "single", "async_save": True},
    "sharded": {"checkpoint": "sharded"},
    "sharded, beside the steps": {"checkpoint": "sharded", "async_save": True},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of saving, all rounds together."""

    way: str
    saves: int
    saved_mb: float  # on disk, of one checkpoint
    step_s: float  # median without a save
    held_up_s: tuple[float, float, float]  # min, median, max over saves
    per_save_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings = [f"model.moe.hidden={asked.hidden}", "loop.batch_size=1", "loop.seq_len=128"]
    settings += ["loop.eval_every=0", "loop.eval_tokens=128"]
    settings += [f"loop.steps={asked.saves * asked.every + asked.every}", "loop.keep_last=1"]
    recipe = load_recipe("tiny", settings)
    dataset = prepare(recipe.data, default_cache(), say=lambda line: print(line, file=sys.stderr))
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    saved_mb = dict.fromkeys(WAYS, 0.0)
    for number in range(asked.rounds):
        for way, fields in WAYS.items():
            every = 0 if way == "never" else asked.every
            gaps, saved_mb[way] = run(replace(recipe, loop=replace(recipe.loop, save_every=every, **fields)), dataset)
            times[way].append(gaps)
            print(f"round {number}, {way}: {sum(gaps):.1f} s", file=sys.stderr)
    rows = [row(way, times, saved_mb[way], asked.every) for way in WAYS if way != "never"]
    found = {"rows": [asdict(each) for each in rows], "params": sizes(recipe.model).total, "torch": torch.__version__}
    json.dump(found | {"threads": 1, "settings": settings}, sys.stdout, indent=1)
    print()


def run(recipe: Recipe, dataset: Dataset) -> tuple[list[float], float]:
    """Seconds from each step's end to the next one's; and the size of a checkpoint."""
    ends: list[float] = []

    def note(_: Progress) -> None:
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, dataset, Path(folder))
        trainer.train(StopRequest(), on_step=note)
        trainer.close()
        saved = sum(file.stat().st_size for file in Path(folder).glob("checkpoints/step-*/*"))
    return [after - before for before, after in itertools.pairwise(ends)], saved / 1e6


def row(way: str, times: dict[str, list[list[float]]], saved_mb: float, every: int) -> Row:
    """What this way cost beside never saving."""
    # the gap at place i ends with step i + 2: that after a save of step s is at place s - 1
    warm = every - 1
    calm = statistics.median(gap for gaps in times["never"] for gap in gaps[warm:])
    held = sorted(gap - calm for gaps in times[way] for gap in gaps[warm::every])
    extra = sum(sum(gaps[warm:]) for gaps in times[way]) - sum(sum(gaps[warm:]) for gaps in times["never"])
    return Row(
        way=way,
        saves=len(held),
        saved_mb=round(saved_mb, 1),
        step_s=round(calm, 4),
        held_up_s=(round(held[0], 4), round(statistics.median(held), 4), round(held[-1], 4)),
        per_save_s=round(extra / len(held), 4),
    )


if __name__ == "__main__":
    main()
