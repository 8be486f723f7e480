"""What one pipeline stage does with one micro-batch: the module that torch's schedules run."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from turnout.comm import TensorGroup
from turnout.data.sampler import Batch
from turnout.layers import MoE
from turnout.layers.lm_loss import lm_loss
from turnout.models import Decoder
from turnout.parallel.tokens import cutting
from turnout.tensors import Assignment, LossTerm, MoEOutput, MoEStats, first_order, total_loss


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch, and what its losses weigh in the step."""

    batch: Batch
    main: float = 0.0
    aux: float = 0.0


@dataclass(kw_only=True)
class Passed:
    """What this rank's stages made of a micro-batch, by number of the layer; `h_BSD` and `main` on the last alone."""

    h_BSD: Tensor | None = None  # normed, ready for logits; of passes that do not learn
    main: Tensor | None = None  # mean loss of its targets, a rank's own where ranks share them; of those that do
    losses: dict[int, tuple[LossTerm, ...]] = field(default_factory=dict)
    stats: dict[int, MoEStats] = field(default_factory=dict)
    assignments: dict[int, Assignment] = field(default_factory=dict)  # of passes that do not learn


class StagePass(nn.Module):
    """Micro-batches come in the order of their numbers, to every stage and in every schedule.

    Only hidden states travel. Auxiliary losses of a stage enter its own backward pass, with the weight that they have
    in one process, so they wait for nobody and no message grows.
    """

    def __init__(
        self, model: Decoder, layers: range, tensor: TensorGroup | None, *, is_first: bool, is_last: bool
    ) -> None:
        """`tensor`: the ranks that have the same tokens, and take a share of the loss each."""
        super().__init__()
        self._tensor = tensor
        self.model = model
        self.is_first, self.is_last = is_first, is_last
        self._layers = layers
        self._sparse = tuple(layer for layer in layers if isinstance(model.blocks[layer].ffn, MoE))
        self._coming: deque[tuple[MicroBatch, Passed]] = deque()
        self._autocast: torch.autocast | None = None
        self._step_stats: list[MoEStats] | None = None
        self._learns = False

    def begin(
        self,
        parts: Sequence[tuple[MicroBatch, Passed]],
        autocast: torch.autocast,
        *,
        learns: bool,
        step_stats: dict[int, MoEStats] | None,
    ) -> None:
        """Before a step: the micro-batches that will come, and where to write down what becomes of each."""
        self._coming, self._autocast, self._learns = deque(parts), autocast, learns
        self._step_stats = None if step_stats is None else [step_stats[layer] for layer in self._sparse]

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (B, S, D) from the stage before, of no meaning to the first; returns the same, or (1,) at last."""
        assert self._autocast is not None
        part, passed = self._coming.popleft()
        with self._autocast:
            return self._passed(x, part, passed)

    def _passed(self, x: Tensor, part: MicroBatch, passed: Passed) -> Tensor:
        model, batch = self.model, part.batch
        x_BSD = model.embed(batch.tokens_BS) if self.is_first else x
        x_BSD, reports = model.run_blocks(
            x_BSD, batch.tokens_BS, self._layers, mask_BS=batch.mask_BS, step_stats=self._step_stats
        )
        self._note(reports, passed)
        aux = part.aux * total_loss(tuple(term for report in reports for term in report.losses))
        if not self.is_last:
            return _WithLoss.apply(x_BSD, aux.to(x_BSD.device)) if self._learns and aux.requires_grad else x_BSD
        h_BSD = model.norm(x_BSD)
        if not self._learns:
            passed.h_BSD = h_BSD
            return h_BSD.new_zeros(1, dtype=torch.promote_types(h_BSD.dtype, torch.float32))
        targets_BS = batch.targets_BS
        if self._tensor is not None:
            cut = cutting(targets_BS.shape, self._tensor.size)
            h_BSD, targets_BS = (cut.share(each, self._tensor.place) for each in (h_BSD, targets_BS))
        main = lm_loss(h_BSD.flatten(0, 1), model.head, targets_BS.flatten())
        passed.main = main.detach()
        # a tensor of its own: torch lets go of its history in place, which views do not allow
        return torch.stack([part.main * main + aux.to(main.device)])

    def _note(self, reports: Sequence[MoEOutput], passed: Passed) -> None:
        for layer, report in zip(self._sparse, reports, strict=True):
            passed.losses[layer] = tuple(
                LossTerm(name=t.name, value=t.value.detach(), coefficient=t.coefficient, scope=t.scope)
                for t in report.losses
            )
            passed.stats[layer] = report.stats
            if not self._learns:
                passed.assignments[layer] = report.assignment


class _WithLoss(torch.autograd.Function):
    """x, and in the backward pass a gradient of one for the loss beside it: as if that were added to the total.

    Source of the idea: Megatron-LM's MoEAuxLossAutoScaler, arXiv:2104.04473's code base.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.of_loss = torch.ones_like(loss)
        # not x itself, nor a view of it: schedules that split the backward pass detach what a stage gave in place
        return x.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], ctx.of_loss
