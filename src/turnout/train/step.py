"""One optimizer step: micro-batches, gradients, a check for NaN, the update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from turnout.contracts import Router
from turnout.data.sampler import Batch
from turnout.models import Decoder
from turnout.models.decoder import DecoderLoss
from turnout.tensors import LossTerm, MoEStats
from turnout.train.guards import clip_and_check, nonfinite_report

LossFunction = Callable[[Tensor, Tensor], DecoderLoss]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step saw; `problem` names the first thing that is not finite, and then nothing was updated."""

    loss: float  # mean main loss over the micro-batches, auxiliary terms apart
    total_loss: float
    aux: dict[str, float]  # name -> value, averaged over layers and micro-batches, without coefficient
    grad_norm: float
    stats: tuple[MoEStats, ...]  # one per MoE layer, summed over micro-batches
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

    The gradient is that of the mean over micro-batches. Routers that learn from load get the step's stats.
    """
    results = [_forward_backward(loss_function, batch, len(batches), autocast) for batch in batches]
    stats = _sum_stats([result.stats for result in results])
    loss = sum(r.main.item() for r in results) / len(results)
    total = sum(r.total.item() for r in results) / len(results)
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
        aux=_mean_terms([term for r in results for term in r.losses]),
        grad_norm=float(report.norm),
        stats=stats,
        problem=problem,
    )


def _forward_backward(
    loss_function: LossFunction, batch: Batch, num_batches: int, autocast: torch.autocast
) -> DecoderLoss:
    with autocast:
        result = loss_function(batch.tokens_BS, batch.targets_BS)
    (result.total / num_batches).backward()
    return DecoderLoss(
        main=result.main.detach(),
        losses=tuple(
            LossTerm(name=t.name, value=t.value.detach(), coefficient=t.coefficient, scope=t.scope)
            for t in result.losses
        ),
        stats=result.stats,
    )


def _sum_stats(per_batch: Sequence[tuple[MoEStats, ...]]) -> tuple[MoEStats, ...]:
    totals = per_batch[0]
    for stats in per_batch[1:]:
        totals = tuple(a + b for a, b in zip(totals, stats, strict=True))
    return totals


def _mean_terms(terms: Sequence[LossTerm]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for term in terms:
        values.setdefault(term.name, []).append(term.value.item())
    return {name: sum(seen) / len(seen) for name, seen in values.items()}


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
