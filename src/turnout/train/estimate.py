"""How long a run will take here: measured on a few steps of its own, not guessed from FLOPs."""

import math
import os
import statistics
import time

import torch

from turnout.data.sampler import Batch
from turnout.models import Decoder
from turnout.train.device import autocast_for, compute_dtype, pick_device
from turnout.train.optimizer import build_optimizer
from turnout.train.recipe import Recipe
from turnout.train.step import train_step

_WARMUP, _TIMED = 1, 3


def memory_here(device: torch.device) -> int:
    """Bytes of memory the device has in all: a run needs them free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds_per_step(recipe: Recipe) -> float:
    """Median seconds of an optimizer step at the recipe's full size, on random tokens; torch's generator is put back.

    Random tokens load the experts of a fresh router about evenly; a trained router's steps take somewhat longer.
    """
    loop = recipe.loop
    device = pick_device(loop.device)
    with torch.random.fork_rng():
        model = Decoder(recipe.model).to(device)
        shape = (loop.batch_size, loop.seq_len)
        tokens_BS = torch.randint(recipe.model.vocab_size, shape, device=device)
        optimizer = build_optimizer(model, recipe.optimizer)
        seconds = []
        for _ in range(_WARMUP + _TIMED):
            started = time.perf_counter()
            train_step(
                model,
                model.loss,
                optimizer,
                [Batch(tokens_BS=tokens_BS, targets_BS=tokens_BS)] * loop.accumulate,
                max_norm=recipe.optimizer.clip or math.inf,
                autocast=autocast_for(device, compute_dtype(device, loop.precision)),
            )
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[_WARMUP:])
