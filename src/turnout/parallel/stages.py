"""The pipeline of a step: this rank's stages, run by torch's schedules over all micro-batches.

Every rank of the pipeline is given the same micro-batches. What a step reports has the shape that one process gives it:
layers of other ranks are there with zeros, so that sums over ranks are sums over stages too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from turnout.comm import Groups, Ledger, StageGroup
from turnout.data.sampler import Batch
from turnout.errors import ConfigError
from turnout.models import Decoder
from turnout.models.decoder import DecoderLoss
from turnout.parallel.stage_counted import CountedStage, given, stepped
from turnout.parallel.stage_cut import StageCut, cut_of, keep_own
from turnout.parallel.stage_gather import of_stages
from turnout.parallel.stage_losses import count_within
from turnout.parallel.stage_pass import MicroBatch, Passed, StagePass
from turnout.parallel.stage_schedules import Schedule, check_micro_batches, enough, make_schedule
from turnout.strategy import Strategy
from turnout.tensors import LossTerm, MoEStats


def cut_stages(model: nn.Module, groups: Groups, strategy: Strategy, ledger: Ledger) -> "Stages | None":
    """Keep this rank's stages of the model, if it is to lie in such; every rank calls it."""
    if groups.stages is None:
        return None
    assert isinstance(model, Decoder)
    cut = cut_of(model.config, strategy, groups.stages.place)
    elsewhere = keep_own(model, cut)
    count_within([layer for _, layer in model.moe_blocks()], groups.like)
    last = len(cut.layers) - 1
    own = {
        stage: StagePass(model, cut.layers[stage], groups.tensor, is_first=stage == 0, is_last=stage == last)
        for stage in cut.own
    }
    return Stages(model, cut, own, groups.stages, strategy, ledger, elsewhere=elsewhere)


Report = tuple[MoEStats, tuple[LossTerm, ...]]  # of one layer


class Stages:
    """The stages of one rank."""

    def __init__(
        self,
        model: Decoder,
        cut: StageCut,
        own: Mapping[int, StagePass],
        group: StageGroup,
        strategy: Strategy,
        ledger: Ledger,
        *,
        elsewhere: frozenset[str],
    ) -> None:
        """`own`: this rank's stages by their numbers; `elsewhere`: names of the tensors that others have."""
        self.elsewhere = elsewhere
        self.tied = frozenset({"embedding_VD"} if model.config.tie_embeddings else ())  # what both ends have
        self._model, self._cut, self._own, self._group = model, cut, own, group
        self._strategy, self._ledger = strategy, ledger
        self._schedules: dict[tuple[object, ...], Schedule] = {}
        self._silent: dict[int, Report] | None = None

    @property
    def cut(self) -> StageCut:
        return self._cut

    def enough(self, number: int) -> int:
        """The least number of micro-batches from that on that the schedule runs without filling up."""
        return enough(self._strategy, number)

    def train(
        self,
        parts: Sequence[MicroBatch],
        autocast: torch.autocast,
        *,
        step_stats: Sequence[MoEStats] | None = None,
    ) -> list[DecoderLoss]:
        """Forward and backward over all micro-batches; gradients add up in the parameters, weighed as the parts say.

        Raises: ConfigError if the schedule does not take so many; TransportError if a rank is gone.
        """
        found = self._run(parts, autocast, learns=True, step_stats=step_stats)
        return self._whole(found)

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], autocast: torch.autocast) -> list[Passed]:
        """What this rank's stages make of so many batches of one shape; none learns.

        Filled up to a number that the schedule takes, for random draws are then those of the steps that learn.
        """
        filled = [*batches, *[batches[-1]] * (self.enough(len(batches)) - len(batches))]
        parts = [MicroBatch(batch=batch) for batch in filled]
        return self._run(parts, autocast, learns=False, step_stats=None)[: len(batches)]

    def stats(self, found: Sequence[Passed]) -> list[tuple[MoEStats, ...]]:
        """Those of all layers of the model, zeros where another rank has them. Every rank of the pipeline calls it."""
        return [result.stats for result in self._whole(found)]

    def _run(
        self,
        parts: Sequence[MicroBatch],
        autocast: torch.autocast,
        *,
        learns: bool,
        step_stats: Sequence[MoEStats] | None,
    ) -> list[Passed]:
        number, shape = len(parts), tuple(parts[0].batch.tokens_BS.shape)
        if any(part.batch.tokens_BS.shape != shape for part in parts):
            raise ConfigError("all micro-batches of a pipeline must have one shape: what stages send has one size")
        found = [Passed() for _ in parts]
        of_layers = None if step_stats is None else dict(zip(self._sparse, step_stats, strict=True))
        for stage in self._own.values():
            pairs = list(zip(parts, found, strict=True))
            stage.begin(pairs, autocast, learns=learns, step_stats=of_layers)
        schedule = self._schedule(number, shape, learns=learns)
        # torch cuts what it is given into micro-batches; ours know theirs, so it is given their numbers
        numbers = torch.arange(number)
        with self._ledger.pipelined(self._cut.place):
            stepped(
                schedule,
                [numbers] if self._cut.has_first else [],
                self._ledger,
                target=numbers if self._cut.has_last and learns else None,
            )
        return found

    @property
    def _sparse(self) -> tuple[int, ...]:
        return self._model.config.moe_layers()

    def _schedule(self, number: int, shape: tuple[int, ...], *, learns: bool) -> Schedule:
        key = (number, shape, learns)
        if key not in self._schedules:
            check_micro_batches(self._strategy, number)
            stages = [self._stage(stage, shape) for stage in self._cut.own]
            self._schedules[key] = make_schedule(self._strategy, stages, number, given if learns else None)
        return self._schedules[key]

    def _stage(self, stage: int, shape: tuple[int, ...]) -> PipelineStage:
        weight, module = next(self._model.parameters()), self._own[stage]
        # shapes are known, so no stage has to be tried out; the residual stream has the dtype of the weights
        hidden = torch.empty(*shape, self._model.config.dim, dtype=weight.dtype, device="meta", requires_grad=True)
        loss = torch.empty(1, dtype=torch.promote_types(weight.dtype, torch.float32), device="meta", requires_grad=True)
        return CountedStage(
            module,
            stage,
            len(self._cut.layers),
            weight.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if module.is_first else hidden,
            output_args=loss if module.is_last else hidden,
            group=self._group.wire,
            ledger=self._ledger,
        )

    def _whole(self, found: Sequence[Passed]) -> list[DecoderLoss]:
        layers = self._everywhere(found[0])
        zero = torch.zeros((), device=self._device)
        return [
            DecoderLoss(
                main=zero if each.main is None else each.main,
                losses=tuple(term for layer in layers for term in each.losses.get(layer, layers[layer][1])),
                stats=tuple(each.stats.get(layer, layers[layer][0]) for layer in layers),
            )
            for each in found
        ]

    def _everywhere(self, own: Passed) -> Mapping[int, Report]:
        """Every layer with experts, in order, and what it would report of no tokens: settled once."""
        if self._silent is None:
            # tensors of a device would arrive on the sender's
            mine = {layer: _silent((stats, own.losses[layer]), "cpu") for layer, stats in own.stats.items()}
            with self._ledger.inside("agreement on what stages report"):
                told = of_stages(mine, self._group)
            together = {layer: report for each in told for layer, report in each.items()}
            self._silent = {layer: _silent(together[layer], self._device) for layer in sorted(together)}
        return self._silent

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def _silent(report: Report, device: torch.device | str) -> Report:
    """The same with zeros, on a device."""
    stats, terms = report
    zeros = {each.name: torch.zeros_like(getattr(stats, each.name), device=device) for each in fields(MoEStats)}
    return MoEStats(**zeros), tuple(replace(term, value=torch.zeros_like(term.value, device=device)) for term in terms)
