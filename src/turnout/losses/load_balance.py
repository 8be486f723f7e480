"""The load-balance loss of GShard and Switch, for any number of choices."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.contracts import Loss
from turnout.errors import ConfigError, ShapeError
from turnout.tensors import Admission, Assignment, LossTerm, MoEStats, RouterOutput, Scope


def load_balance_loss(scores_RE: Tensor, counts_E: Tensor) -> Tensor:
    """Balance loss E * sum_e(load_e * mean score_e); exactly 1 when routing is uniform.

    The gradient goes through the scores alone: counts are not differentiable. With no tokens it is 0.

    Shapes: scores_RE (R, E), rows sum to 1; counts_E (E,) assignments per expert; returns ().
    Raises: ShapeError if the two disagree on E.
    Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1 (times E^2); Fedus et al. 2021,
        arXiv:2101.03961, eq. 4-6 (without alpha); general k as in Megatron-Core: E / (k T^2) * sum.
    """
    return load_balance_from_counts(scores_RE, counts_E, num_tokens=scores_RE.shape[0])


def load_balance_from_counts(scores_RE: Tensor, counts_E: Tensor, *, num_tokens: int) -> Tensor:
    """What these tokens add to the balance loss of a whole step of `num_tokens` tokens, with the whole step's counts.

    The values of the step's parts (micro-batches, ranks), and their gradients, add up to those of the whole, however
    the tokens are split and wherever padding stands. A step that averages n parts gives each n times its value, or
    `load_balance_loss` with the step's counts, weighed by the part's share of the tokens: the two are equal.

    Shapes: scores_RE (R, E), rows sum to 1; counts_E (E,) assignments per expert of the whole step; returns ().
    Raises: ShapeError if the two disagree on E.
    Source: Qiu et al. 2025, arXiv:2501.11873.
    """
    num_experts = scores_RE.shape[1]
    if counts_E.shape != (num_experts,):
        raise ShapeError(f"counts_E has shape {tuple(counts_E.shape)}; scores_RE needs ({num_experts},)")
    load_E = counts_E.to(scores_RE.dtype) / counts_E.sum().clamp(min=1)
    return num_experts * (load_E * scores_RE.sum(dim=0)).sum() / max(num_tokens, 1)


@Loss.TABLE.register("load_balance")
@dataclass(frozen=True, kw_only=True)
class LoadBalance(Loss):
    """Load-balance loss; load is counted over the micro-batch, each sequence, the call on all ranks, or the whole step.

    Scope `data_parallel` sums the counts of a call over the ranks; `global` those of all micro-batches too, for which
    a training step that accumulates routes its text twice. The mean score stays the call's own: weighed by their
    tokens, the terms of a step and their gradients add up to the whole's.
    With `global` and `sequence` one coefficient is one pull however a step is split; at the default, the papers',
    it pulls harder the more micro-batches or ranks share a step, for each is to be balanced: see docs/layers.md.
    Source of the wide scopes: Qiu et al. 2025, arXiv:2501.11873, who keep a running count over micro-batches instead.
    """

    balances = True

    coefficient: float = 0.01  # weight of the term in the total loss
    scope: Scope = "micro_batch"  # tokens over which load is counted; global, sequence: however a step is split
    count: Literal["all", "first"] = "all"  # choices that count as load; GShard's algorithm 1 counts first choices

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"load_balance.coefficient={self.coefficient} must be at least 0")
        if self.scope == "global" and self.count == "first":
            raise ConfigError("load_balance.count='first' cannot be counted over scope='global'; legal: count='all'")

    @property
    def spans_step(self) -> bool:
        return self.scope == "global"

    def term(
        self,
        routing: RouterOutput,
        admission: Admission,
        *,
        sequence_length: int,
        step_stats: MoEStats | None = None,
    ) -> LossTerm:
        """Counts every choice made, dropped or not, as the papers do.

        At scope `global` a call without `step_stats` is taken for the whole step of its rank.
        """
        del admission
        if self.scope == "sequence":
            value = self._sequence_value(routing, sequence_length)
            return LossTerm(name="load_balance", value=value, coefficient=self.coefficient, scope=self.scope)
        if self.scope == "global" and step_stats is not None:
            return self.term_of(routing, step_stats.assigned_E)
        counts_E = self.own_counts(routing.assignment)
        if self.counts_ranks(step_stats) and dist.is_available() and dist.is_initialized():
            counts_E = counts_E.clone()
            dist.all_reduce(counts_E)
        return self.term_of(routing, counts_E)

    def counts_ranks(self, step_stats: MoEStats | None) -> bool:
        """Whether a call adds up the counts of ranks: what the whole step does, if it is known, has them already."""
        return self.scope == "data_parallel" or (self.scope == "global" and step_stats is None)

    def own_counts(self, assignment: Assignment) -> Tensor:
        """Choices of this call that are load. Shapes: returns (E,) int64."""
        return assignment.counts_E if self.count == "all" else assignment.first_choice_counts_E()

    def term_of(self, routing: RouterOutput, counts_E: Tensor) -> LossTerm:
        """The term of a call where so much load is counted, over whatever the scope says. Shapes: counts_E (E,)."""
        value = load_balance_loss(routing.scores_RE, counts_E)
        return LossTerm(name="load_balance", value=value, coefficient=self.coefficient, scope=self.scope)

    def _sequence_value(self, routing: RouterOutput, sequence_length: int) -> Tensor:
        """Mean over sequences, each weighed by its share of the routed tokens."""
        assignment, scores_RE = routing.assignment, routing.scores_RE
        num_sequences = -(-assignment.num_tokens // max(sequence_length, 1))
        num_experts = assignment.num_experts
        sequence_R = routing.token_R // sequence_length
        sequence_N = assignment.token_N // sequence_length
        counted_N = torch.ones_like(sequence_N) if self.count == "all" else (assignment.choice_N == 0).long()
        counts = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=scores_RE.device)
        counts = counts.index_add(0, sequence_N * num_experts + assignment.expert_N, counted_N)
        counts = counts.view(num_sequences, num_experts).to(scores_RE.dtype)
        load = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        score_sums = scores_RE.new_zeros(num_sequences, num_experts).index_add(0, sequence_R, scores_RE)
        return num_experts * (load * score_sums).sum() / max(len(sequence_R), 1)
