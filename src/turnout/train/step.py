"""One optimizer step: micro-batches, gradients, a check for NaN, the update."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn, optim

from turnout.contracts import Router
from turnout.data.sampler import Batch
from turnout.models import Decoder
from turnout.models.decoder import DecoderLoss
from turnout.parallel import MicroBatch, Parallel, reduce_gradients
from turnout.tensors import LossTerm, MoEStats, total_loss
from turnout.train.guards import ExpertAt, GradReport, clip_and_check, nonfinite_report
from turnout.train.parts import Share, count_ahead, own_stats, shares, sum_up

LossFunction = Callable[..., DecoderLoss]  # Decoder.loss, compiled or not


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step saw; `problem` names the first thing that is not finite, and then nothing was updated."""

    loss: float  # mean main loss over the step's targets, auxiliary terms apart; of ranks, whose mean it is
    total_loss: float
    aux: dict[str, float]  # name -> value, averaged over layers and tokens, without coefficient
    grad_norm: float
    stats: tuple[MoEStats, ...]  # one per MoE layer, summed over micro-batches and ranks
    own: tuple[MoEStats, ...]  # the same of this rank alone
    problem: str | None


def train_step(
    model: Decoder,
    loss_function: LossFunction,
    optimizer: optim.Optimizer,
    batches: Sequence[Batch],
    *,
    max_norm: float,
    autocast: torch.autocast,
    parallel: Parallel | None = None,
) -> StepResult:
    """Forward and backward over every micro-batch, then clip and update, unless something is not finite.

    The gradient is that of the mean over the step's tokens, however they are split into micro-batches and ranks.
    Routers that learn from load get the whole step's stats. What is reported is the whole step's, the same on all
    ranks, so that they decide alike. Without `parallel` the gradients stay those of this rank.
    """
    with _inside(parallel, "sum of targets"):
        weights = shares(batches, parallel)
    repeats = 1 if parallel is None else parallel.repeats
    step_stats = count_ahead(model, batches, autocast, repeats=repeats, parallel=parallel)
    if parallel is not None and parallel.stages is not None:
        parts = [MicroBatch(batch=b, main=s.main, aux=s.aux) for b, s in zip(batches, weights, strict=True)]
        results = parallel.stages.train(parts, autocast, step_stats=step_stats)
    else:
        results = []
        for number, (batch, share) in enumerate(zip(batches, weights, strict=True), start=1):
            if parallel is not None:
                parallel.before_backward(model, is_last=number == len(batches))
            results.append(_forward_backward(loss_function, batch, share, step_stats, autocast))
    with _inside(parallel, "sum of statistics and losses"):
        own = [result.stats for result in results]
        names, values = _losses(results, weights)
        counted = own if step_stats is None else [()]
        stats, values = sum_up(counted, values, repeats=repeats, parallel=parallel)
        stats = stats if step_stats is None else step_stats
        # stages have one loss between them
        stages = 1 if parallel is None else parallel.strategy.pp
        loss, aux_total, *terms = [stages * value for value in values]
    if parallel is not None:
        reduce_gradients(model, parallel)
    report = _clip(model, max_norm, parallel)
    problem = None
    if not (report.finite and math.isfinite(loss + aux_total)):
        problem = _name_problem(model, loss, [term for r in results for term in r.losses], parallel)
    else:
        optimizer.step()
        layers = dict(model.moe_blocks())
        for number, layer_stats in zip(model.config.moe_layers(), stats, strict=True):
            layer = layers.get(f"blocks.{number}")
            if layer is not None and isinstance(layer.router, Router):
                layer.router.after_step(layer_stats)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        total_loss=loss + aux_total,
        aux=dict(zip(names, terms, strict=True)),
        grad_norm=float(report.norm),
        stats=stats,
        own=own_stats(own),
        problem=problem,
    )


def _forward_backward(
    loss_function: LossFunction,
    batch: Batch,
    share: Share,
    step_stats: tuple[MoEStats, ...] | None,
    autocast: torch.autocast,
) -> DecoderLoss:
    with autocast:
        result = loss_function(batch.tokens_BS, batch.targets_BS, mask_BS=batch.mask_BS, step_stats=step_stats)
    aux = total_loss(result.losses).to(result.main.device)
    (share.main * result.main + share.aux * aux).backward()
    return DecoderLoss(
        main=result.main.detach(),
        losses=tuple(
            LossTerm(name=t.name, value=t.value.detach(), coefficient=t.coefficient, scope=t.scope)
            for t in result.losses
        ),
        stats=result.stats,
    )


def _inside(parallel: Parallel | None, collective: str) -> AbstractContextManager[None]:
    return nullcontext() if parallel is None else parallel.ledger.inside(collective)


def _losses(results: Sequence[DecoderLoss], weights: Sequence[Share]) -> tuple[list[str], list[float]]:
    """The names of this rank's auxiliary losses; and the main loss, the sum of the auxiliary ones with their
    coefficients, and each of these alone.
    """
    main = sum(share.main * r.main.item() for share, r in zip(weights, results, strict=True))
    total = sum(share.aux * float(total_loss(r.losses)) for share, r in zip(weights, results, strict=True))
    terms = _mean_terms([r.losses for r in results], weights)
    return list(terms), [main, total, *terms.values()]


def _clip(model: nn.Module, max_norm: float, parallel: Parallel | None) -> GradReport:
    parameters = list(model.parameters())
    if parallel is None:
        return clip_and_check(parameters, max_norm)
    return clip_and_check(parameters, max_norm, copies=parallel.copies(model), over_ranks=parallel.over_ranks)


def _mean_terms(per_batch: Sequence[tuple[LossTerm, ...]], weights: Sequence[Share]) -> dict[str, float]:
    layers = Counter(term.name for term in per_batch[0])
    sums = dict.fromkeys(layers, 0.0)
    for terms, share in zip(per_batch, weights, strict=True):
        for term in terms:
            sums[term.name] += share.aux * term.value.item() / layers[term.name]
    return sums


def _name_problem(model: nn.Module, loss: float, terms: Sequence[LossTerm], parallel: Parallel | None) -> str:
    """Weights first: they are the cause where they are not finite; then losses, then gradients; of any rank."""
    if parallel is None or parallel.world.size == 1:
        return _own_problem(model, loss, terms, lambda name, row: row) or "the gradient norm overflowed"
    own = _own_problem(model, loss, terms, parallel.shards.expert_at)
    found = [f"{text} (rank {rank})" for rank, text in enumerate(parallel.world.all(own)) if text]
    return min(found, key=lambda text: not text.startswith("weight"), default="the gradient norm overflowed")


def _own_problem(model: nn.Module, loss: float, terms: Sequence[LossTerm], expert_at: ExpertAt) -> str:
    weights = nonfinite_report(model.named_parameters(), expert_at)
    if weights is not None:
        return f"weight {weights}"
    bad_terms = [term.name for term in terms if not torch.isfinite(term.value)]
    grads = nonfinite_report(((name, p.grad) for name, p in model.named_parameters()), expert_at)
    parts = [] if math.isfinite(loss) else [f"main loss is {loss}"]
    parts += [f"auxiliary loss {name} is not finite" for name in dict.fromkeys(bad_terms)]
    parts += [] if grads is None else [f"gradient {grads}"]
    return "; ".join(parts)
