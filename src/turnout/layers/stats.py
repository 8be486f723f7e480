"""What a layer reports about one call."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from turnout.contracts import Loss
from turnout.tensors import Admission, Assignment, LossTerm, MoEStats, Routed, RouterOutput

# entropy and margin of all 4,096 tokens took 1.4 % of a training step of `tiny`, of this many 0.4 %
MEASURED_TOKENS = 1024

# how tokens were routed and admitted; of a few in inference put together when first called
Decided = Callable[[], tuple[RouterOutput, Admission]]


def routed(decided: Decided, losses: tuple[Loss, ...], *, sequence_length: int, step_stats: MoEStats | None) -> Routed:
    """What follows from a routing, to be asked for.

    The auxiliary losses are formed at once where gradients are recorded, or ranks compute.
    """
    form = partial(_loss_terms, decided, losses, sequence_length, step_stats)
    return Routed(
        decide=partial(_sent, decided),
        # activation checkpointing records the layer alone; and some terms are sums that all ranks must ask for
        formed=form() if torch.is_grad_enabled() or _has_ranks() else None,
        form=form,
        collect=partial(_stats, decided),
    )


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sent(decided: Decided) -> tuple[Assignment, Tensor | None]:
    routing, admission = decided()
    return routing.assignment, admission.keep_N


def _loss_terms(
    decided: Decided, losses: tuple[Loss, ...], sequence_length: int, step_stats: MoEStats | None
) -> tuple[LossTerm, ...]:
    """The router's own terms, then those of the settings."""
    terms = (loss.term(*decided(), sequence_length=sequence_length, step_stats=step_stats) for loss in losses)
    return (*decided()[0].losses, *terms)


def _stats(decided: Decided) -> MoEStats:
    return collect_stats(*decided())


@torch.no_grad()
def collect_stats(routing: RouterOutput, admission: Admission) -> MoEStats:
    """Counts and drops of one call, exact; entropy and margin, of more than 1,024 tokens from some of them.

    Small tensors on the layer's device, no host copy.
    """
    scores_RE = routing.scores_RE
    num_routed = len(routing.token_R)
    measured_RE = _spread(scores_RE)
    tokens_each = num_routed / max(len(measured_RE), 1)
    return MoEStats(
        assigned_E=routing.assignment.counts_E,
        dropped_capacity_E=admission.dropped_E["capacity"],
        dropped_policy_E=admission.dropped_E["policy"],
        num_routed=_count(num_routed, scores_RE.device),
        num_padding=_count(routing.assignment.num_tokens - num_routed, scores_RE.device),
        entropy_sum=torch.special.entr(measured_RE).sum() * tokens_each,
        margin_sum=_margin(measured_RE).sum() * tokens_each,
        tally=scores_RE.new_zeros(0) if routing.tally is None else routing.tally.detach(),
    )


def _spread(scores_RE: Tensor) -> Tensor:
    """At most 1,024 tokens at an equal, odd distance: in sequences of 2^n tokens every position has its turn."""
    step = -(-len(scores_RE) // MEASURED_TOKENS)
    return scores_RE[:: max(step, 1) | 1]


def _margin(scores_RE: Tensor) -> Tensor:
    """Best score minus the second best, 0 for a tie.

    By two maxima over the first axis, where they are vectorised: several times cheaper than torch's topk on CPU.
    """
    scores_ER = scores_RE.t().contiguous()
    best_R = scores_ER.amax(dim=0)
    is_best_ER = scores_ER == best_R
    second_R = scores_ER.masked_fill(is_best_ER, 0.0).amax(dim=0)
    return (best_R - second_R).masked_fill_(is_best_ER.sum(dim=0) > 1, 0.0)


def _count(value: int, device: torch.device) -> torch.Tensor:
    # filled on the device: torch.tensor would copy from the host
    return torch.full((), value, dtype=torch.int64, device=device)
