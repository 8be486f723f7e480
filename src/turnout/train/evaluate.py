"""The mean loss on validation text: the same text whatever the number of ranks, which take turns with its batches."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch.nn.functional import pad

from turnout.data.sampler import Batch, validation_batches
from turnout.data.shards import TokenShard
from turnout.layers.lm_loss import IGNORE, lm_loss
from turnout.models import Decoder
from turnout.parallel import Parallel
from turnout.train.signals import StopRequest

_AT_ONCE = 4  # batches of one pass through a pipeline of stages, so that most of them work most of the time


def mean_loss(
    model: Decoder,
    text: TokenShard,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int,
    parallel: Parallel,
    autocast: torch.autocast,
    stop: StopRequest | None = None,
) -> float | None:
    """Mean loss of a target, the same number on every rank; None where a stop request of any rank ended it early.
    All ranks make the same number of calls, for experts may lie on any of them: a rank that is left without text
    computes on padding.
    """
    total, count = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    # weights that are gathered for the first time in inference mode could not be trained after
    with torch.no_grad(), autocast:
        at, turns = parallel.text_place
        at_once = 1 if parallel.stages is None else parallel.stages.enough(_AT_ONCE)
        for several in _turns(validation_batches(text, batch_size, seq_len, max_tokens), turns * at_once):
            if parallel.world.largest([float(stop is not None and stop.requested)])[0]:
                count = 0
                break
            mine = [
                (several[place] if place < len(several) else _padding(several[0])).to(device)
                for place in range(at, turns * at_once, turns)
            ]
            # none is larger than the first, on any rank
            found = _losses(model, mine, parallel, autocast, sequences=len(several[0].tokens_BS))
            for batch, main in zip(mine, found, strict=True):
                targets = parallel.own_targets(batch.targets_BS).numel() if batch.mask_BS is None else 0
                if targets and main is not None:
                    total, count = total + main * targets, count + targets
    model.train()
    total, count = parallel.world.total([total, float(count)])
    return total / count if count else None


def _losses(
    model: Decoder, batches: Sequence[Batch], parallel: Parallel, autocast: torch.autocast, *, sequences: int
) -> list[float | None]:
    """The mean loss of each, which have at most so many sequences; None where another pipeline stage takes it."""
    if parallel.stages is None:
        found = [model.loss(batch.tokens_BS, batch.targets_BS, mask_BS=batch.mask_BS).main for batch in batches]
    else:
        # all micro-batches of a pipeline have one shape
        filled = [_filled(batch, sequences) for batch in batches]
        passes = zip(filled, parallel.stages.forward(filled, autocast), strict=True)
        found = [
            None if p.h_BSD is None else lm_loss(p.h_BSD.flatten(0, 1), model.head, batch.targets_BS.flatten())
            for batch, p in passes
        ]
    return [None if loss is None else loss.item() for loss in found]


def _turns(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while turn := list(islice(batches, size)):
        yield turn


def _filled(batch: Batch, sequences: int) -> Batch:
    """The batch with as many sequences of padding as it lacks."""
    missing = sequences - len(batch.tokens_BS)
    if missing == 0:
        return batch
    mask_BS = torch.ones_like(batch.tokens_BS, dtype=torch.bool) if batch.mask_BS is None else batch.mask_BS
    rows = (0, 0, 0, missing)
    return Batch(
        tokens_BS=pad(batch.tokens_BS, rows),
        targets_BS=pad(batch.targets_BS, rows, value=IGNORE),
        mask_BS=pad(mask_BS, rows, value=False),
    )


def _padding(like: Batch) -> Batch:
    return Batch(
        tokens_BS=like.tokens_BS,
        targets_BS=torch.full_like(like.targets_BS, IGNORE),
        mask_BS=torch.zeros_like(like.tokens_BS, dtype=torch.bool),
    )
