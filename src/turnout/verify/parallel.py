"""The self-check of a layout: a recipe's model on many ranks of this machine against one process, tensor by tensor."""

import math
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnout.comm import World
from turnout.comm.processes import as_rank, start_ranks
from turnout.config import dump_toml, from_dict
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.losses import LoadBalance
from turnout.models import Decoder, ModelConfig
from turnout.parallel import Parallel, apply
from turnout.train.device import autocast_for
from turnout.train.recipe import Recipe, check_ranks
from turnout.train.step import train_step
from turnout.train.tuned import with_strategy

LENGTH = 32  # tokens of the one sequence that a rank gets
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
TIMEOUT_S = 300.0
_LEAST = 1e-6  # a tensor is measured against its largest value, or this where it is all but zero


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One tensor of the step: how far the ranks are from one process, over its largest value."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.error <= self.tolerance


def verify_parallel(recipe: Recipe, ranks: int) -> list[Compared]:
    """Logits, losses, statistics and every gradient of one step, on `ranks` gloo processes and in this one.

    In float64, or in float32 where the recipe names an expert backend that has no other; random tokens, no noise.
    Raises: ConfigError if the recipe cannot run on so many ranks.
    """
    if ranks < 2:
        raise ConfigError(f"ranks={ranks} must be at least 2: one process is what they are compared with")
    # the layout that training would take where the recipe leaves it open
    recipe = with_strategy(recipe, World(size=ranks, local_size=ranks))
    sized = replace(recipe, loop=replace(recipe.loop, batch_size=ranks))
    check_ranks(sized, ranks)
    dtype = _dtype(recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        text = dump_toml(recipe)
        start_ranks(_rank, ranks, text, ranks, folder)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    batches, tp = _batches(recipe.model, ranks), recipe.strategy.tp
    # who routes by himself has a micro-batch of his own
    batches = batches if recipe.strategy.sequence_parallel else _together(batches, tp)
    # a pipeline's ranks have all its micro-batches, the last of them the logits
    found_logits = [each.pop("logits") for each in found if "logits" in each]
    want = _step(_in_one_process(recipe.model), dtype, batches, None)
    limit = TOLERANCE[dtype]
    logits = torch.cat(found_logits[::tp])
    rows = [Compared(name="logits", error=_error(logits, want.pop("logits")), tolerance=limit)]
    return rows + [
        Compared(name=name, error=max(_error(each[name], value) for each in found if name in each), tolerance=limit)
        for name, value in want.items()
    ]


def _rank(rank: int, text: str, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    recipe = from_dict(Recipe, tomllib.loads(text))
    with as_rank(rank, ranks, folder, timeout_s=TIMEOUT_S) as world:
        tp, pp = recipe.strategy.tp, recipe.strategy.pp
        place = rank % (ranks // pp) // tp
        # as many micro-batches as stages: so many every schedule takes
        mine = _together(_batches(recipe.model, ranks), tp)[place * pp : (place + 1) * pp]
        outcome = _step(recipe.model, _dtype(recipe.model), mine, (recipe, world))
        torch.save(outcome, Path(folder) / f"{rank}.pt")


def _step(
    config: ModelConfig, dtype: torch.dtype, batches: Sequence[Batch], on: tuple[Recipe, World] | None
) -> dict[str, Tensor]:
    """What one step of a fresh model finds: everything by name, experts whole, on the ranks that have them whole."""
    torch.manual_seed(0)
    # out of training, so that no router draws at random: ranks would draw otherwise than one process
    model = Decoder(config).to(dtype).eval()
    parallel = None if on is None else apply(model, on[0].strategy, world=on[1], timeout_s=TIMEOUT_S)
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        hidden = _hidden(model, batches, parallel, autocast)
        if hidden:
            found["logits"] = torch.cat([model.logits(h_BSD) for h_BSD in hidden])
    if parallel is not None:
        parallel.reshard(model)
    grads: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: grads.update(_gradients(model, parallel)))
    result = train_step(model, model.loss, optimizer, batches, max_norm=math.inf, autocast=autocast, parallel=parallel)
    if result.problem is not None:
        raise ConfigError(f"the model cannot be compared: {result.problem}")
    scalars = {"loss": result.loss, "gradient norm": result.grad_norm, **result.aux}
    found |= {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}
    for layer, stats in zip(config.moe_layers(), result.stats, strict=True):
        found[f"statistics of blocks.{layer}"] = torch.cat(
            [value.double().reshape(-1) for value in vars(stats).values()]
        )
    return found | {f"gradient of {name}": grad for name, grad in grads.items()}


def _hidden(
    model: Decoder, batches: Sequence[Batch], parallel: Parallel | None, autocast: torch.autocast
) -> list[Tensor]:
    """What the head gets of each micro-batch; nothing where another pipeline stage has the head."""
    if parallel is None or parallel.stages is None:
        return [model(batch.tokens_BS).h_BSD for batch in batches]
    return [each.h_BSD for each in parallel.stages.forward(batches, autocast) if each.h_BSD is not None]


def _gradients(model: Decoder, parallel: Parallel | None) -> dict[str, Tensor]:
    """All gradients whole; on ranks that do not gather them without those of which they have a part."""
    grads: dict[str, Any] = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    if parallel is None:
        return grads
    shards = parallel.shards
    whole = shards.whole(grads)
    return {name: grad for name, grad in whole.items() if shards.gathers(name) or shards.parts(name) == 1}


def _batches(config: ModelConfig, ranks: int) -> list[Batch]:
    """One sequence of random tokens for each rank."""
    g = torch.Generator().manual_seed(1)
    length = min(LENGTH, config.max_seq_len)
    tokens_BS = torch.randint(config.vocab_size, (ranks, length + 1), generator=g)
    return [Batch(tokens_BS=row[:, :-1].contiguous(), targets_BS=row[:, 1:].contiguous()) for row in tokens_BS.split(1)]


def _together(batches: Sequence[Batch], tp: int) -> list[Batch]:
    """The sequences of tensor-parallel ranks, which all of them get."""
    groups = [batches[start : start + tp] for start in range(0, len(batches), tp)]
    fields = ("tokens_BS", "targets_BS")
    return [Batch(**{name: torch.cat([getattr(each, name) for each in group]) for name in fields}) for group in groups]


def _dtype(config: ModelConfig) -> torch.dtype:
    return torch.float32 if config.moe is not None and config.moe.backend == "grouped_mm" else torch.float64


def _in_one_process(config: ModelConfig) -> ModelConfig:
    """Ranks are micro-batches here: what is counted over ranks is counted over those."""
    if config.moe is None:
        return config
    losses = tuple(
        replace(loss, scope="global") if isinstance(loss, LoadBalance) and loss.scope == "data_parallel" else loss
        for loss in config.moe.losses
    )
    return replace(config, moe=replace(config.moe, losses=losses))


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if want.numel() == 0:
        return 0.0
    scale = max(float(want.abs().max()), _LEAST)
    return float((got.double() - want.double()).abs().max()) / scale
