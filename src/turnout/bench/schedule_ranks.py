"""The processes of `turnout bench tuner`: `python -m turnout.bench.schedule_ranks CASE`, a case as JSON.

First the tuner learns, level by level and then over the schedule, until it has nothing left to try. Then every step of
the schedule is taken by the tuner, which goes on learning, and by each candidate, in an order drawn anew.
"""

import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from turnout.bench.lab import Lab
from turnout.bench.overlap_parts import forget
from turnout.bench.ranks import fork_ranks
from turnout.bench.schedule_case import ScheduleCase
from turnout.bench.turns import common_start
from turnout.comm import World
from turnout.contracts import Dispatcher
from turnout.layers import MoE
from turnout.parallel import Parallel, apply
from turnout.parallel.tuner import Tuner, dictionary_for
from turnout.routers import TopK
from turnout.strategy import Strategy
from turnout.tensors import MoEStats
from turnout.train.parts import sum_stats
from turnout.tune import Choice, Rules

TIMEOUT_S = 600.0


def main() -> None:
    case = ScheduleCase.from_json(json.loads(sys.argv[1]))
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(case.hosts, case.links)) if case.lab else None
        found = fork_ranks(partial(_measured, case, lab), case.mesh, lab=lab, timeout_s=TIMEOUT_S)
    # the tuner's times and decisions are the same on all
    print(json.dumps(found[0]))


def _measured(case: ScheduleCase, lab: Lab | None, world: World) -> dict[str, Any]:
    steps = Steps(case, world)
    found = steps.learn(range(len(case.tokens))) | steps.measure()
    if lab is None or not case.then_mbit:
        return found
    if world.is_first:
        lab.pace(case.then_mbit)
    world.barrier()
    # its own times are all that tells the tuner
    return found | {"then": steps.learn(()) | steps.measure()}


class Steps:
    """One rank's layer, which steps as the tuner or as one candidate wants it."""

    def __init__(self, case: ScheduleCase, world: World) -> None:
        torch.manual_seed(0)
        self._case, self._world = case, world
        self._layer = MoE(case.dim, case.hidden, case.experts, router=TopK(k=case.k), losses=())
        self._parallel = apply(self._layer, Strategy(ep=case.ep, etp=case.etp), world=world, timeout_s=TIMEOUT_S)
        self._quiet = cast(ProcessGroup, dist.new_group(list(range(world.size))))
        torch.manual_seed(1 + world.rank)
        self._x_TD = torch.randn(max(case.tokens), case.dim)
        dictionary = dictionary_for(self._parallel, self._x_TD.device, "", "a dictionary", Rules(trials=case.trials))
        self.tuner = Tuner(self._layer, self._parallel, dictionary, element_bytes=self._x_TD.element_size())
        self._static = {choice: _dispatcher(choice, self._layer, self._parallel) for choice in self.tuner.candidates}

    def learn(self, levels: Sequence[int]) -> dict[str, Any]:
        """Steps of each of these until nothing is left to try there, then the schedule until that stays so.

        On its way from level to level a step is known by the one before, of another level: that is learned too.
        """
        began_s, steps, periods, is_warm = time.perf_counter(), 0, 0, False
        for level in levels:
            for _ in range(self._case.most_steps):
                self._tuned(level)
                steps += 1
                if self.tuner.is_warm:
                    break
        while not is_warm and periods < self._case.most_periods:
            is_warm, periods = True, periods + 1
            for level in self._case.period():
                self._tuned(level)
                steps, is_warm = steps + 1, is_warm and self.tuner.is_warm
        seconds = time.perf_counter() - began_s
        return {"learning": {"steps": steps, "warm": is_warm, "periods": periods, "seconds": seconds}}

    def measure(self) -> dict[str, Any]:
        """The schedule, everybody in turns in every step, and the dictionary after it."""
        gc.collect()
        gc.freeze()
        gc.disable()
        measured = [self.race(number, level) for number, level in enumerate(self._case.periods * self._case.period())]
        gc.enable()
        return {"steps": measured, "dictionary": self.tuner.dictionary.to_json()}

    def race(self, number: int, level: int) -> dict[str, Any]:
        """Seconds of one step of the schedule: the tuner's, and each candidate's."""
        names: list[Choice | None] = [None, *self._static]
        seconds: dict[str, float] = {}
        taken = None
        for name in random.Random(number).sample(names, len(names)):
            gc.collect()
            if name is None:
                taken, seconds["tuner"] = self._tuned(level)
                continue
            self._layer.reach(self._static[name])
            seconds[str(name)], _ = self._timed(level)
        return {"level": level, "taken": str(taken), "seconds": seconds}

    def _tuned(self, level: int) -> tuple[Choice, float]:
        self._parallel = self.tuner.before_step(self._layer, self._parallel)
        taken = self.tuner.choice
        # a candidate's turn has put its own there
        self._layer.reach(self._static[taken])
        seconds, stats = self._timed(level)
        self.tuner.after_step(seconds, stats, 1)
        return taken, seconds

    def _timed(self, level: int) -> tuple[float, Sequence[MoEStats]]:
        """A step, on the slowest rank, and its statistics, of all ranks."""
        x_TD = self._x_TD[: self._case.tokens[level]].clone().requires_grad_()
        forget(list(self._layer.parameters()))
        start_s = common_start(self._world, self._quiet, self._case.links.delay_ms)
        out = self._layer(x_TD)
        out.y.backward(torch.ones_like(out.y))
        took_s = time.perf_counter() - start_s
        return self._world.largest([took_s])[0], sum_stats([(out.stats,)])


def _dispatcher(choice: Choice, layer: MoE, parallel: Parallel) -> Dispatcher:
    parallel.switched(layer, **vars(choice))
    return layer.dispatcher


if __name__ == "__main__":
    main()
