"""The parts of an optimizer step, its micro-batches and ranks: what each weighs, and what all do together."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.comm.world import is_joined, naming
from turnout.data.sampler import Batch
from turnout.layers.lm_loss import IGNORE
from turnout.models import Decoder
from turnout.parallel import Parallel
from turnout.tensors import MoEStats


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a micro-batch weighs in its step: its losses are means, and the step's are means over all its tokens.

    Ranks average their gradients, so the shares of all ranks add up to the number of ranks.
    """

    main: float  # of the targets that are to be predicted
    aux: float  # of the tokens that are not padding


def shares(batches: Sequence[Batch], parallel: Parallel | None = None) -> list[Share]:
    """The share of each of this rank's micro-batches; so neither accumulation nor padding changes a coefficient.

    Of ranks that were given the same text each counts the targets and the tokens that are its own.
    """
    targets = [batch.targets_BS if parallel is None else parallel.own_targets(batch.targets_BS) for batch in batches]
    masks = [torch.ones_like(batch.tokens_BS) if batch.mask_BS is None else batch.mask_BS for batch in batches]
    tokens = [int((mask if parallel is None else parallel.own_tokens(mask)).sum()) for mask in masks]
    counts = [int((each != IGNORE).sum()) for each in targets]
    all_targets, all_tokens = _over_ranks(torch.tensor([sum(counts), sum(tokens)]), parallel).clamp(min=1).tolist()
    ranks = dist.get_world_size() if is_joined() else 1
    return [
        Share(main=ranks * main / all_targets, aux=ranks * aux / all_tokens)
        for main, aux in zip(counts, tokens, strict=True)
    ]


@torch.no_grad()
def count_ahead(
    model: Decoder,
    batches: Sequence[Batch],
    autocast: torch.autocast,
    *,
    repeats: int = 1,
    parallel: Parallel | None = None,
) -> tuple[MoEStats, ...] | None:
    """What the step will do in each MoE layer, where a loss has to know it before the first gradient; None elsewhere.

    It takes a forward pass over every micro-batch, with the random draws that the training pass will make again. A
    single micro-batch needs none: its own call knows.
    """
    moe = model.config.moe
    if len(batches) == 1 or moe is None or not any(loss.spans_step for loss in moe.losses):
        return None
    device = batches[0].tokens_BS.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast:
        if parallel is not None and parallel.stages is not None:
            stats = parallel.stages.stats(parallel.stages.forward(batches, autocast))
        else:
            stats = [model(batch.tokens_BS, mask_BS=batch.mask_BS).stats for batch in batches]
        return sum_stats(stats, repeats=repeats, parallel=parallel)


def own_stats(per_batch: Sequence[tuple[MoEStats, ...]]) -> tuple[MoEStats, ...]:
    """Each layer's stats over this rank's micro-batches."""
    totals = per_batch[0]
    for stats in per_batch[1:]:
        totals = tuple(a + b for a, b in zip(totals, stats, strict=True))
    return totals


def sum_stats(
    per_batch: Sequence[tuple[MoEStats, ...]], *, repeats: int = 1, parallel: Parallel | None = None
) -> tuple[MoEStats, ...]:
    """Each layer's stats over this rank's micro-batches and all ranks, of which `repeats` report the same tokens."""
    return sum_up(per_batch, (), repeats=repeats, parallel=parallel)[0]


def sum_up(
    per_batch: Sequence[tuple[MoEStats, ...]],
    numbers: Sequence[float],
    *,
    repeats: int = 1,
    parallel: Parallel | None = None,
) -> tuple[tuple[MoEStats, ...], list[float]]:
    """The same, and numbers averaged over all ranks: not a number anywhere is not a number everywhere."""
    totals = own_stats(per_batch)
    if not is_joined() or not (totals or numbers):
        return totals, list(numbers)
    # one message for all layers; float64 holds every count below 2^53
    values = [getattr(stats, field.name) for stats in totals for field in fields(MoEStats)]
    own = torch.tensor(numbers, dtype=torch.float64, device=values[0].device if values else None)
    together = _over_ranks(torch.cat([*(value.double().flatten() for value in values), own]), parallel)
    *parts, mean = together.split([*(value.numel() for value in values), len(numbers)])
    summed = iter((part / repeats).view_as(v).to(v.dtype) for part, v in zip(parts, values, strict=True))
    stats = tuple(MoEStats(**{field.name: next(summed) for field in fields(MoEStats)}) for _ in totals)
    return stats, (mean / dist.get_world_size()).tolist()


def _over_ranks(value: Tensor, parallel: Parallel | None) -> Tensor:
    if parallel is not None:
        return parallel.sum(value)
    if is_joined():
        with naming("a sum of statistics"):
            dist.all_reduce(value)
    return value
