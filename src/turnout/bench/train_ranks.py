"""Case train-ranks: an optimizer step of a recipe on several ranks of this machine, against DeepSpeed's MoE layers.

All peers live in the same processes and take turns; a step is over when it is over on the slowest rank. The recipe's
batch is cut over the ranks, and its experts lie on all of them. `deepspeed-mixtral` is transformers' Mixtral of that
shape with DeepSpeed's layers, in DeepSpeed's engine: nothing in it is ours. In the others DeepSpeed's layers stand in
our own decoder, which `deepspeed` trains with DeepSpeed's engine and `deepspeed-bare` with the barest of loops. These
drop what is over their capacity, as they do unless told; `deepspeed-bare-dropless` and ours compute every token.
`turnout-deepspeed-routing` is our model with the routing of DeepSpeed's gate, to compare like with like.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter
from tomllib import loads
from typing import Any

import torch
import torch.distributed as dist

from turnout.allocator import keep_memory
from turnout.bench.deepspeed_step import (
    check_deepspeed,
    check_experts,
    deepspeed_step,
    engine_step,
    mixtral_engine_step,
    routed_like_deepspeed,
)
from turnout.bench.mixtral import check_shape, routing_words
from turnout.bench.race import Timing, ratio
from turnout.bench.run import check_gate, ratio_keys, result, row
from turnout.comm import World
from turnout.comm.lines import intention
from turnout.comm.processes import as_rank, start_ranks
from turnout.config import dump_toml, from_dict
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.models import Decoder
from turnout.parallel import apply
from turnout.strategy import Strategy
from turnout.train.device import autocast_for
from turnout.train.optimizer import build_optimizer
from turnout.train.recipe import Recipe, check_ranks
from turnout.train.step import train_step

OURS, LIKE = "turnout", "turnout-deepspeed-routing"
MIXTRAL, ENGINE, BARE, DROPLESS = "deepspeed-mixtral", "deepspeed", "deepspeed-bare", "deepspeed-bare-dropless"
THEIRS = {MIXTRAL, ENGINE, BARE, DROPLESS}
PEERS = (OURS, LIKE, MIXTRAL, ENGINE, BARE, DROPLESS)
TIMEOUT_S = 600.0


def run(
    recipe: Recipe, ranks: int, *, peers: Sequence[str] = (), threads: int = 0, rounds: int, warmup: int
) -> dict[str, Any]:
    """A row for each of `peers` (none: all of PEERS). `threads` of a rank; 0: the cores shared out.

    Raises: ConfigError if a peer is unknown, not installed or cannot have the recipe's shape, or the recipe cannot run
    on so many ranks; TurnoutError, before anything is timed, if a backend does not compute what the oracle computes.
    """
    names = tuple(peers) or PEERS
    placed = replace(recipe, strategy=Strategy(ep=ranks))
    _check(placed, ranks, names)
    check_gate()
    threads = threads or max(1, torch.get_num_threads() // ranks)
    with TemporaryDirectory() as folder:
        start_ranks(_rank, ranks, dump_toml(placed), ranks, folder, names, threads, rounds, warmup)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    timings = {name: _slowest([each[name] for each in found]) for name in names}
    rows = [_row(name, timings, placed, ranks, threads) for name in names]
    return result(rows, "deepspeed", ranks=ranks, links_of_turnout=intention())


def _check(recipe: Recipe, ranks: int, names: Sequence[str]) -> None:
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"unknown peer {name!r}; available: {', '.join(PEERS)}")
    if ranks < 2:
        raise ConfigError(f"--ranks {ranks} must be at least 2: one process is measured by `turnout bench train-step`")
    if not recipe.model.moe_layers():
        raise ConfigError(f"the recipe {recipe.name!r} has no experts; train-ranks measures one that has")
    check_ranks(recipe, ranks)
    if THEIRS & set(names):
        check_deepspeed()
        check_experts(recipe)
    if MIXTRAL in names:
        check_shape(recipe)


def _slowest(of_ranks: Sequence[Sequence[float]]) -> Timing:
    return Timing(ms=tuple(max(of_round) for of_round in zip(*of_ranks, strict=True)))


def _row(name: str, timings: dict[str, Timing], recipe: Recipe, ranks: int, threads: int) -> dict[str, Any]:
    def over(other: str) -> Any:
        return ratio(timings[name], timings[other]) if other in timings else None

    model = recipe.model if name == OURS else routed_like_deepspeed(recipe.model)
    assert model.moe is not None
    tokens = recipe.loop.batch_size * recipe.loop.seq_len
    return {
        **row("train-ranks", name, timings[name]),
        "ranks": ranks,
        "threads": threads,
        "routing": routing_words(model.moe),
        "tokens_per_s": 1e3 * tokens / timings[name].median,
        **ratio_keys("speedup_of_turnout", over(OURS)),
        **ratio_keys("speedup_of_turnout_deepspeed_routing", over(LIKE)),
    }


# --- on a rank ---


def _rank(
    rank: int, text: str, ranks: int, folder: str, names: Sequence[str], threads: int, rounds: int, warmup: int
) -> None:
    torch.set_num_threads(threads)
    # as `turnout train` does; the peers are in the same process, and have it too
    keep_memory()
    recipe = from_dict(Recipe, loads(text))
    with as_rank(rank, ranks, folder, timeout_s=TIMEOUT_S) as world:
        batch = _batch(recipe, world)
        steps = {name: contestant(name, recipe, batch, world) for name in names}
        taken = _take_turns(steps, rounds=rounds, warmup=warmup)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(taken), encoding="utf-8")


def contestant(name: str, recipe: Recipe, batch: Batch, world: World) -> Callable[[], object]:
    """One of PEERS: this rank's part of a training step on its part of a fixed batch."""
    torch.manual_seed(0)
    if name == MIXTRAL:
        return mixtral_engine_step(recipe, batch)
    if name == ENGINE:
        return engine_step(recipe, batch)
    if name in (BARE, DROPLESS):
        return deepspeed_step(recipe, batch, drop_tokens=name == BARE)
    model = Decoder(recipe.model if name == OURS else routed_like_deepspeed(recipe.model))
    parallel = apply(model, recipe.strategy, world=world, timeout_s=TIMEOUT_S)
    return partial(
        train_step,
        model,
        model.loss,
        build_optimizer(model, recipe.optimizer),
        [batch],
        max_norm=recipe.optimizer.max_norm,
        autocast=autocast_for(torch.device("cpu"), torch.float32),
        parallel=parallel,
    )


def _batch(recipe: Recipe, world: World) -> Batch:
    """This rank's sequences of a batch of random tokens."""
    loop, generator = recipe.loop, torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(recipe.model.vocab_size, (loop.batch_size, loop.seq_len + 1), generator=generator)
    own_BS = tokens_BS.tensor_split(world.size)[world.rank]
    return Batch(tokens_BS=own_BS[:, :-1].contiguous(), targets_BS=own_BS[:, 1:].contiguous())


def _take_turns(steps: dict[str, Callable[[], object]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of every step on this rank, round by round; all ranks begin together and draw the same order."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name in Random(number).sample(sorted(steps), len(steps)):
            dist.barrier()
            started = perf_counter()
            steps[name]()
            if number >= warmup:
                taken[name].append(1e3 * (perf_counter() - started))
    return taken
