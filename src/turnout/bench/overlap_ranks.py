"""The processes of `turnout bench overlap`: `python -m turnout.bench.overlap_ranks CASE`, a case as JSON.

Prints one JSON object: when each round was over on the last rank, and what the tuner learned.
"""

import json
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from turnout.bench.lab import Lab
from turnout.bench.overlap_case import OverlapCase
from turnout.bench.overlap_parts import forget, parts_of
from turnout.bench.ranks import fork_ranks
from turnout.bench.turns import Work, common_start, in_turns, of_slowest
from turnout.comm import World
from turnout.layers import MoE
from turnout.parallel import Parallel, apply
from turnout.parallel.tuner import Tuner, dictionary_for
from turnout.routers import TopK
from turnout.strategy import Strategy
from turnout.train.parts import sum_stats
from turnout.tune import Choice

TIMEOUT_S = 120.0


def main() -> None:
    case = OverlapCase.from_json(json.loads(sys.argv[1]))
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(case.hosts, case.links)) if case.lab else None
        found = fork_ranks(partial(_measured, case), case.mesh, lab=lab, timeout_s=10 * TIMEOUT_S)
    print(json.dumps({"seconds": of_slowest([each["ends"] for each in found]), "dictionary": found[0]["dictionary"]}))


def _measured(case: OverlapCase, world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = MoE(case.dim, case.hidden, case.experts, router=TopK(k=case.k), losses=())
    parallel = apply(layer, Strategy(ep=world.size), world=world, timeout_s=TIMEOUT_S)
    group = parallel.groups.experts
    assert group is not None
    torch.manual_seed(1 + world.rank)
    x_TD = torch.randn(case.tokens, case.dim)
    contestants: dict[str, Work] = {}
    for chunks in case.chunks:
        parallel = parallel.switched(layer, overlap=chunks)
        dispatcher = layer.dispatcher
        for mode in case.modes:
            parts = parts_of(layer, dispatcher, x_TD, group, chunks, train=mode == "train")
            contestants |= {f"{mode} {chunks} {name}": work for name, work in vars(parts).items()}
    quiet = cast(ProcessGroup, dist.new_group(list(range(world.size))))
    ends = in_turns(contestants, world, quiet, rounds=case.rounds, warmup=case.warmup, delay_ms=case.links.delay_ms)
    return {"ends": ends, "dictionary": _tuned(case, layer, parallel, x_TD, quiet) if case.tune else ""}


def _tuned(case: OverlapCase, layer: MoE, parallel: Parallel, x_TD: Tensor, quiet: ProcessGroup) -> str:
    """What the tuner learned of such a step, as its file has it; it chooses among the chunks of the case alone."""
    dictionary = dictionary_for(parallel, x_TD.device, "", "a dictionary")
    among = [Choice(adaptive_r=1, overlap=chunks, alltoall="flat") for chunks in case.chunks]
    tuner = Tuner(layer, parallel, dictionary, element_bytes=x_TD.element_size(), among=among)
    given_TD, grad_TD = x_TD.clone().requires_grad_(), torch.randn_like(x_TD)
    while not tuner.is_warm:
        parallel = tuner.before_step(layer, parallel)
        start_s = common_start(parallel.world, quiet, case.links.delay_ms)
        out = layer(given_TD)
        out.y.backward(grad_TD)
        took_s = time.perf_counter() - start_s
        # the decision is everybody's, so what it is made from is too
        tuner.after_step(took_s, sum_stats([(out.stats,)], repeats=1), 1)
        forget((given_TD, *layer.parameters()))
    return tuner.dictionary.to_json()


if __name__ == "__main__":
    main()
