"""One optimizer step: micro-batches, gradients, a check for NaN, the update."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn, optim

from turnout.contracts import Router
from turnout.data.sampler import Batch
from turnout.models import Decoder
from turnout.models.decoder import DecoderLoss
from turnout.tensors import LossTerm, MoEStats, total_loss
from turnout.train.guards import clip_and_check, nonfinite_report
from turnout.train.parts import Share, count_ahead, shares, sum_stats

LossFunction = Callable[..., DecoderLoss]  # Decoder.loss, compiled or not


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step saw; `problem` names the first thing that is not finite, and then nothing was updated."""

    loss: float  # mean main loss over the step's targets, auxiliary terms apart; of ranks, whose mean it is
    total_loss: float
    aux: dict[str, float]  # name -> value, averaged over layers and tokens, without coefficient
    grad_norm: float
    stats: tuple[MoEStats, ...]  # one per MoE layer, summed over micro-batches and ranks
    problem: str | None


def train_step(
    model: Decoder,
    loss_function: LossFunction,
    optimizer: optim.Optimizer,
    batches: Sequence[Batch],
    *,
    max_norm: float,
    autocast: torch.autocast,
) -> StepResult:
    """Forward and backward over every micro-batch, then clip and update, unless something is not finite.

    The gradient is that of the mean over the step's tokens, however they are split into micro-batches and ranks.
    Routers that learn from load get the whole step's stats.
    """
    weights, step_stats = shares(batches), count_ahead(model, batches, autocast)
    results = [
        _forward_backward(loss_function, batch, share, step_stats, autocast)
        for batch, share in zip(batches, weights, strict=True)
    ]
    stats = sum_stats([result.stats for result in results]) if step_stats is None else step_stats
    loss = sum(share.main * r.main.item() for share, r in zip(weights, results, strict=True))
    total = loss + sum(share.aux * float(total_loss(r.losses)) for share, r in zip(weights, results, strict=True))
    report = clip_and_check(list(model.parameters()), max_norm)
    problem = None
    if not (report.finite and torch.isfinite(torch.tensor(total))):
        problem = _name_problem(model, loss, [term for r in results for term in r.losses])
    else:
        optimizer.step()
        for (_, layer), layer_stats in zip(model.moe_blocks(), stats, strict=True):
            router = layer.router
            if isinstance(router, Router):
                router.after_step(layer_stats)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        total_loss=total,
        aux=_mean_terms([r.losses for r in results], weights),
        grad_norm=float(report.norm),
        stats=stats,
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


def _mean_terms(per_batch: Sequence[tuple[LossTerm, ...]], weights: Sequence[Share]) -> dict[str, float]:
    layers = Counter(term.name for term in per_batch[0])
    sums = dict.fromkeys(layers, 0.0)
    for terms, share in zip(per_batch, weights, strict=True):
        for term in terms:
            sums[term.name] += share.aux * term.value.item() / layers[term.name]
    return sums


def _name_problem(model: nn.Module, loss: float, terms: Sequence[LossTerm]) -> str:
    """Weights first: they are the cause where they are not finite; then losses, then gradients."""
    weights = nonfinite_report(model.named_parameters())
    if weights is not None:
        return f"weight {weights}"
    bad_terms = [term.name for term in terms if not torch.isfinite(term.value)]
    grads = nonfinite_report((name, p.grad) for name, p in model.named_parameters())
    parts = [] if torch.isfinite(torch.tensor(loss)) else [f"main loss is {loss}"]
    parts += [f"auxiliary loss {name} is not finite" for name in dict.fromkeys(bad_terms)]
    parts += [] if grads is None else [f"gradient {grads}"]
    return "; ".join(parts) or "the gradient norm overflowed"
