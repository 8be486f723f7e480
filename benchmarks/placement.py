"""What a placement of experts saves on two hosts of two ranks: in order, by EPLB, and by the search of the trainer.

Usage: python -m benchmarks.placement [--experts 32] [--text own] [--steps 100] [--own-cards] > RESULT.json

`tiny` with top-2 of so many experts and no loss that balances them trains on four processes, two on each host of a
network lab whose cards have that rate (0: no lab, all on one loopback, which then stands for two hosts in the counts
alone). `own`: each host has half of the text, in the order of its files; `mixed`: both have windows from anywhere.
From what was routed in the last steps the placements are made, at rates that are given and not measured, so that they
are the same at every run; then the same steps, with a learning rate of 0, are run under each. Rows, moves and their
bytes are those of the ledger, in float32. Needs Linux's network namespaces for the lab.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import optim

from turnout.balance import Machine, Routed, eplb
from turnout.bench.lab import Lab, Links, isolated, why_not
from turnout.bench.ranks import fork_ranks
from turnout.cache import default_cache
from turnout.comm import World
from turnout.data.prepare import Dataset, prepare
from turnout.data.sampler import Batch, count_windows, gather
from turnout.models import Decoder
from turnout.parallel import Parallel, apply
from turnout.parallel.moves import move_bytes, moved, placements_of
from turnout.parallel.rebalancer import Rebalancer, Rebalancing
from turnout.placement import Placement
from turnout.routers import TopK
from turnout.strategy import Strategy
from turnout.topology import Link, Mesh
from turnout.train.device import autocast_for
from turnout.train.optimizer import build_optimizer, lr_factor, set_lr
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.step import train_step

MESH = Mesh(nodes=2, local=2)
BATCH = 2  # sequences of a rank in a step
COUNTED, MEASURED = 40, 10  # steps whose routing decides; steps under each placement
PERIOD = 100  # steps that a move must pay for itself in
RATE_MBIT = 400.0
TIMEOUT_S = 600.0


def main() -> None:
    asked = _asked()
    recipe = _recipe(asked.experts)
    if not asked.inside:
        # before there is no way out
        prepare(recipe.data, default_cache(), say=lambda line: print(line, file=sys.stderr))
        reason = why_not() if asked.rate_mbit else ""
        if reason:
            raise SystemExit(f"no lab here: {reason}; --rate-mbit 0 does without")
        words = [sys.executable, "-m", "benchmarks.placement", *sys.argv[1:], "--inside"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        words = isolated(words) if asked.rate_mbit else words
        raise SystemExit(subprocess.run(words, check=False, env=environment).returncode)
    dataset = prepare(recipe.data, default_cache())
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(MESH.nodes, Links(rate_mbit=asked.rate_mbit))) if asked.rate_mbit else None
        found = fork_ranks(lambda world: work(world, recipe, dataset, asked), MESH, lab=lab, timeout_s=TIMEOUT_S)
    command = " ".join(["python -m benchmarks.placement", *(word for word in sys.argv[1:] if word != "--inside")])
    print(json.dumps({"command": command} | found[0], indent=1))


def work(world: World, recipe: Recipe, dataset: Dataset, asked: argparse.Namespace) -> dict[str, Any]:
    """Train with experts in order, then the same steps under each placement."""
    torch.manual_seed(asked.seed)
    model = Decoder(recipe.model)
    parallel = apply(model, recipe.strategy, world=world)
    optimizer = build_optimizer(model, recipe.optimizer)
    windows = _windows(count_windows(dataset.train, recipe.loop.seq_len), asked.text, asked.seed)[world.rank]

    def batch(step: int) -> Batch:
        at = np.arange(step * BATCH, (step + 1) * BATCH) % len(windows)
        return gather(dataset.train, windows[at], recipe.loop.seq_len)

    machine = _machine(asked.rate_mbit, shares_card=not asked.own_cards)
    config = Rebalancing(every=PERIOD, element_bytes=4, machine=machine, spare=asked.spare)
    rebalancer, losses = Rebalancer(model, parallel, config), []
    for step in range(asked.steps):
        set_lr(optimizer, lr_factor(step / asked.steps, recipe.schedule))
        result = _step(model, optimizer, batch(step), recipe, parallel)
        losses.append(result.loss)
        if step >= asked.steps - COUNTED:
            rebalancer.note(result.own)
    # the same steps for each: nothing is learned from here on
    set_lr(optimizer, 0.0)

    def measured(way: str) -> dict[str, Any]:
        found = [_measured(model, optimizer, batch(asked.steps + at), recipe, parallel) for at in range(MEASURED)]
        return _row(way, found, world)

    first = placements_of(model, parallel)
    rows = [measured("in order")]
    parallel, moves, sources = rebalancer.rebalanced(model, parallel, optimizer)
    rows.append(measured("searched"))
    routed = {name: Routed(rows_RE=np.array(each), mesh=MESH) for name, each in zip(first, sources, strict=True)}
    moving: list[dict[str, Any]] = []
    for way, to in (("EPLB", _by_eplb(routed)), ("in order again", first)):
        parallel, sent = _moved(model, parallel, optimizer, to, world)
        moving.append({"to": way} | sent)
        rows.append(measured(way))
    return {
        "recipe": f"tiny, top-2 of {asked.experts}, no balance loss, {asked.text} text, seed {asked.seed}",
        "loss": statistics.fmean(losses[-10:]),
        "machine": {
            "gflops_per_s": machine.flops_per_s / 1e9,
            "intra_mb_per_s": machine.intra.bytes_per_s / 1e6,
            "inter_mb_per_s": machine.inter.bytes_per_s / 1e6,
        },
        "rows": rows,
        "moves": [str(move) for move in moves],
        "moving": moving,
    }


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--text", choices=("own", "mixed"), default="own")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spare", type=int, default=0)
    parser.add_argument("--rate-mbit", type=float, default=RATE_MBIT)
    parser.add_argument("--own-cards", action="store_true", help="as if each rank had half of a card for itself alone")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _recipe(experts: int) -> Recipe:
    """`tiny` with experts of which a token has two, as wide in all as its own."""
    recipe = load_recipe("tiny")
    assert recipe.model.moe is not None
    moe = replace(recipe.model.moe, num_experts=experts, hidden=4096 // experts, router=TopK(k=2), losses=())
    return replace(recipe, model=replace(recipe.model, moe=moe), strategy=Strategy(ep=MESH.size))


def _machine(rate_mbit: float, *, shares_card: bool) -> Machine:
    """Half a core for each rank, memory inside a host, and its card for both ranks between hosts."""
    inter = Link(bytes_per_s=(rate_mbit or RATE_MBIT) * 1e6 / 8 / MESH.local)
    return Machine(flops_per_s=50e9, intra=Link(bytes_per_s=1e9), inter=inter, shares_card=shares_card)


def _windows(num_windows: int, text: str, seed: int) -> list[NDArray[np.int64]]:
    """For each rank the windows it has, in random order."""
    order = np.arange(num_windows)
    if text == "mixed":
        order = np.random.RandomState(0).permutation(order)
    halves = [np.random.RandomState(seed).permutation(half) for half in np.array_split(order, MESH.nodes)]
    return [half[local :: MESH.local] for half in halves for local in range(MESH.local)]


def _step(model: Decoder, optimizer: optim.Optimizer, batch: Batch, recipe: Recipe, parallel: Parallel) -> Any:
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    norm = recipe.optimizer.max_norm
    return train_step(model, model.loss, optimizer, [batch], max_norm=norm, autocast=autocast, parallel=parallel)


def _measured(
    model: Decoder, optimizer: optim.Optimizer, batch: Batch, recipe: Recipe, parallel: Parallel
) -> dict[str, Any]:
    """One step: seconds, what this rank sent, and the rows of each expert of each layer."""
    parallel.world.barrier()
    parallel.ledger.clear()
    began_s = time.perf_counter()
    result = _step(model, optimizer, batch, recipe, parallel)
    seconds, sent = time.perf_counter() - began_s, parallel.take_sent()
    assert sent is not None
    lies = placements_of(model, parallel).values()
    loads = [_loads(stats.assigned_E.tolist(), placement) for stats, placement in zip(result.stats, lies, strict=True)]
    return {"seconds": seconds, "inter": sent["inter_bytes"], "intra": sent["intra_bytes"], "loads": loads,
            "tokens": batch.targets_BS.numel()}  # fmt: skip


def _loads(rows: list[int], placement: Placement) -> float:
    """Rows of the fullest rank over the mean."""
    by_rank = [sum(rows[expert] for expert in placement.experts_of(rank)) for rank in range(placement.ranks)]
    return max(by_rank) / (sum(by_rank) / len(by_rank))


def _row(way: str, found: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """Means over steps and layers; seconds: the median step's on the slowest rank."""
    layers = len(found[0]["loads"])
    tokens = sum(each["tokens"] for each in found)
    inter, intra, tokens = world.total(
        [sum(each["inter"] for each in found), sum(each["intra"] for each in found), tokens]
    )
    busiest = world.largest([sum(each["inter"] for each in found)])[0]
    seconds = statistics.median(world.largest([each["seconds"] for each in found]))
    return {
        "way": way,
        "max_load": statistics.fmean(load for each in found for load in each["loads"]),
        "worst_layer": max(statistics.fmean(each["loads"][layer] for each in found) for layer in range(layers)),
        "inter_bytes_a_token_and_layer": inter / tokens / layers,
        "intra_bytes_a_token_and_layer": intra / tokens / layers,
        "busiest_rank_over_mean": busiest / (inter / world.size),
        "step_s": seconds,
    }


def _by_eplb(routed: dict[str, Routed]) -> dict[str, Placement]:
    found = {}
    for name, each in routed.items():
        rank_of = {expert: rank for rank, pack in enumerate(eplb(list(each.loads_E), MESH)) for expert in pack}
        found[name] = Placement.of([rank_of[expert] for expert in range(each.num_experts)], MESH.size)
    return found


def _moved(
    model: Decoder, parallel: Parallel, optimizer: optim.Optimizer, to: dict[str, Placement], world: World
) -> tuple[Parallel, dict[str, Any]]:
    """The move, with what was shown, counted and taken."""
    shown = move_bytes(model, parallel, optimizer, to)
    world.barrier()
    parallel.ledger.clear()
    began_s = time.perf_counter()
    parallel = moved(model, parallel, optimizer, to)
    (seconds,) = world.largest([time.perf_counter() - began_s])
    counted = sum(size for name in to for size, _ in parallel.ledger.sent(name, "forward", "moves").values())
    return parallel, {
        "bytes_shown": sum(sum(pairs.values()) for pairs in shown.values()),
        "bytes_counted": round(world.total([float(counted)])[0]),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
