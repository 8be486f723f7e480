"""How long a run will take here: measured on a few steps of its own, not guessed from FLOPs."""

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from turnout.comm import World
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.models import Decoder, ModelConfig
from turnout.models.decoder import build_block
from turnout.models.memory import TrainMemory, train_memory
from turnout.models.size import sizes
from turnout.parallel import cut_of
from turnout.parallel.dense_cuts import cut_layers, cuts_of
from turnout.strategy import Strategy
from turnout.train.device import autocast_for, compute_dtype, pick_device
from turnout.train.optimizer import build_optimizer
from turnout.train.recipe import Recipe, sequences_per_rank
from turnout.train.step import StepResult, train_step

_WARMUP, _TIMED = 1, 3


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Numbers are None where the model does not fit, so nothing could be measured."""

    fits: bool
    reason: str  # the estimate, or what it does not fit in
    seconds_per_step: float | None = None
    steps: int | None = None  # of the whole run
    tokens: int | None = None  # of the whole run
    minutes: float | None = None  # of the whole run, without evaluation and saving


def estimate_time(recipe: Recipe, device: torch.device) -> TimeEstimate:
    """Length of the run by a few steps at its full size, if the estimate of its memory says that they fit."""
    loop = recipe.loop
    if words := _misfit(recipe, device, World()):
        return TimeEstimate(fits=False, reason=words)
    seconds = seconds_per_step(recipe, device)
    steps = loop.steps or int(60 * loop.minutes / seconds)
    tokens = steps * loop.batch_size * loop.seq_len * loop.accumulate
    minutes = steps * seconds / 60
    return TimeEstimate(
        fits=True,
        reason=f"{steps:,} steps, {tokens:,} tokens in {minutes:.1f} minutes: measured {seconds:.3g} s a step",
        seconds_per_step=seconds,
        steps=steps,
        tokens=tokens,
        minutes=minutes,
    )


def require_fits(recipe: Recipe, device: torch.device, world: World | None = None) -> None:
    """Raises: ConfigError if a training step is estimated to need more memory than the device has in all."""
    if words := _misfit(recipe, device, World() if world is None else world):
        raise ConfigError(f"{recipe.name} {words}; lower the model's sizes, loop.batch_size or loop.seq_len")


def memory_per_rank(recipe: Recipe, ranks: int) -> int:
    """Estimated bytes of a training step on one of `ranks`; at the start it holds one block whole beside its own.

    Of sharded weights no more is gathered at a time than there is; gradients and moments stay in shards. In
    sequence parallel a rank keeps activations of its own tokens, and what attention gathers; else of all its group's.
    """
    memory = _whole_memory(recipe, ranks)
    own = _own_memory(recipe, ranks, memory)
    return max(own.peak, min(memory.parameters, own.parameters + _largest_block(recipe.model)))


def host_copy(recipe: Recipe, ranks: int) -> int:
    """Bytes that `loop.async_save` takes on the host of a rank: what it saves, a second time."""
    memory = _whole_memory(recipe, ranks)
    # in one file the first rank has the whole
    saved = memory if recipe.loop.checkpoint == "single" else _own_memory(recipe, ranks, memory)
    return saved.parameters + saved.moments if recipe.loop.async_save else 0


def _whole_memory(recipe: Recipe, ranks: int) -> TrainMemory:
    sequences, device = sequences_per_rank(recipe, ranks), pick_device(recipe.loop.device)
    return train_memory(recipe.model, sequences, recipe.loop.seq_len, device)


def _own_memory(recipe: Recipe, ranks: int, memory: TrainMemory) -> TrainMemory:
    model, strategy = recipe.model, recipe.strategy
    shares = strategy.ep * strategy.etp
    elsewhere = 4 * sizes(model).routed * (shares - 1) // shares - 4 * copied_parameters(model, strategy)
    of_others = 4 * shared_parameters(model, strategy) * (strategy.tp - 1) // strategy.tp if strategy.tp > 1 else 0
    elsewhere += of_others
    shards = (strategy.zero_size or ranks // strategy.tp) if strategy.zero else 1
    scatters = strategy.zero and strategy.zero_sum == "micro_batch"
    activations = memory.activations
    if strategy.sequence_parallel:
        gathered = 4 * model.num_layers * model.dim * sequences_per_rank(recipe, ranks) * recipe.loop.seq_len
        activations = activations // strategy.tp + gathered
    if strategy.pp > 1:
        share = _most_blocks(recipe) / model.num_layers
        # a table that only one end has, or both: hardly a block is as large in a small model
        tables = 4 * model.vocab_size * model.dim
        elsewhere += round((memory.parameters - elsewhere - tables) * (1 - share))
        in_flight = recipe.loop.accumulate if strategy.schedule == "gpipe" else strategy.pp
        activations = round(activations * share * min(in_flight, recipe.loop.accumulate))
    return replace(
        memory,
        activations=activations,
        parameters=memory.parameters - elsewhere,
        gradients=(memory.gradients - of_others) // shards if scatters else memory.gradients - elsewhere,
        moments=(memory.moments - 2 * of_others) // shards if strategy.zero else memory.moments - 2 * elsewhere,
    )


def _largest_block(model: ModelConfig) -> int:
    """Bytes of its weights."""
    with torch.device("meta"):
        blocks = [build_block(model, layer=layer) for layer in range(model.num_layers)]
    return max(sum(4 * weight.numel() for weight in block.parameters()) for block in blocks)


def _most_blocks(recipe: Recipe) -> int:
    """Blocks of the rank of a pipeline that has most."""
    cut = cut_of(recipe.model, recipe.strategy, 0)
    return max(sum(len(layers) for layers in cut.layers[place :: cut.ranks]) for place in range(cut.ranks))


def copied_parameters(model: ModelConfig, strategy: Strategy) -> int:
    """The parameters of copies that a rank has room for, in all layers."""
    if not strategy.expert_copies or model.moe is None:
        return 0
    number = model.moe.num_experts
    more = strategy.places(number) - replace(strategy, expert_copies=0).places(number)
    return sizes(model).routed // number * more // strategy.etp


def shared_parameters(model: ModelConfig, strategy: Strategy) -> int:
    """The parameters that tensor-parallel ranks share."""
    with torch.device("meta"):
        decoder = Decoder(model)
    layers = cut_layers(decoder, shared_experts=not strategy.sequence_parallel)
    cuts = [cut for name, layer in layers for cut in cuts_of(name, layer, strategy.tp).values()]
    return sum(math.prod(cut.shape) for cut in cuts)


def _misfit(recipe: Recipe, device: torch.device, world: World) -> str:
    """Memory wanted and there, or nothing where it fits; the ranks of a node share the memory of its CPU."""
    needed, here = memory_per_rank(recipe, world.size), memory_here(device)
    if device.type == "cpu":
        here, needed = here // world.local_size, needed + host_copy(recipe, world.size)
    if needed <= here:
        return ""
    return f"does not fit: it needs about {needed / 2**20:,.0f} MiB and {device} has {here / 2**20:,.0f}"


def memory_here(device: torch.device) -> int:
    """Bytes of memory the device has in all: a run needs them free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds_per_step(recipe: Recipe, device: torch.device) -> float:
    """Median seconds of an optimizer step at the recipe's full size, on random tokens; torch's generator is put back.

    Random tokens load the experts of a fresh router about evenly; a trained router's steps take somewhat longer.
    """
    loop = recipe.loop
    with torch.random.fork_rng():
        model = Decoder(recipe.model).to(device)
        shape = (loop.batch_size, loop.seq_len)
        tokens_BS = torch.randint(recipe.model.vocab_size, shape, device=device)
        batches = [Batch(tokens_BS=tokens_BS, targets_BS=tokens_BS)] * loop.accumulate
        step = step_on(model, batches, recipe, compute_dtype(device, recipe))
        seconds = []
        for _ in range(_WARMUP + _TIMED):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[_WARMUP:])


def step_on(model: Decoder, batches: Sequence[Batch], recipe: Recipe, dtype: torch.dtype) -> Callable[[], StepResult]:
    """The training loop's own step on the same batches again and again, with the recipe's optimizer and clipping."""
    return functools.partial(
        train_step,
        model,
        model.loss,
        build_optimizer(model, recipe.optimizer),
        batches,
        max_norm=recipe.optimizer.max_norm,
        autocast=autocast_for(batches[0].tokens_BS.device, dtype),
    )
