"""Losses that count over ranks, told which: those of one pipeline stage, for the others have other layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from turnout.comm.world import naming
from turnout.contracts import Loss
from turnout.layers import MoE
from turnout.losses import LoadBalance
from turnout.tensors import Admission, LossTerm, MoEStats, RouterOutput


def count_within(layers: Sequence[MoE], group: ProcessGroup | None) -> None:
    """From here on the losses of these layers count over that group; None: over this rank alone."""
    for layer in layers:
        own = [WithinGroup(loss=loss, group=group) if isinstance(loss, LoadBalance) else loss for loss in layer.losses]
        layer.form(tuple(own))


@dataclass(frozen=True, kw_only=True)
class WithinGroup(Loss):
    """A load-balance loss whose load is counted over a group of ranks, where it counts over ranks at all."""

    loss: LoadBalance
    group: ProcessGroup | None

    @property
    def spans_step(self) -> bool:
        return self.loss.spans_step

    def term(
        self,
        routing: RouterOutput,
        admission: Admission,
        *,
        sequence_length: int,
        step_stats: MoEStats | None = None,
    ) -> LossTerm:
        """As the loss itself, but for the ranks."""
        loss = self.loss
        if not loss.counts_ranks(step_stats):
            return loss.term(routing, admission, sequence_length=sequence_length, step_stats=step_stats)
        counts_E = loss.own_counts(routing.assignment).clone()
        if self.group is not None:
            with naming("the sum of loads"):
                dist.all_reduce(counts_E, group=self.group)
        return loss.term_of(routing, counts_E)
