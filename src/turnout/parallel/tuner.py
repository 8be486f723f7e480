"""The tuner at work: it switches a model before a step, times the step, and decides like all other ranks.

What the decision is made from is the same on all ranks, the statistics of the step and the slowest rank's time, so all
of them switch in the same step.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.layers import MoE
from turnout.parallel.layout import Parallel
from turnout.parallel.probe import hardware_name, probe
from turnout.parallel.supported import check_shards, check_supported
from turnout.strategy import Strategy
from turnout.tensors import MoEStats
from turnout.tune import (
    Choice,
    Dictionary,
    Key,
    LayerShape,
    Rules,
    Workload,
    alike,
    candidates,
    is_warm,
    key_of,
    predictions,
)
from turnout.tune.search import Entry, Predicted


class Tuner:
    """Chooses r, chunks and program of the next step; learns from what the step took."""

    def __init__(
        self,
        model: nn.Module,
        parallel: Parallel,
        dictionary: Dictionary,
        *,
        element_bytes: int,
        among: Sequence[Choice] | None = None,
    ) -> None:
        """`among`: what it may take, beside what the layout has now; None: every candidate.

        Raises: ConfigError if no layer has experts that ranks share.
        """
        self.dictionary, self._world = dictionary, parallel.world
        self._shape = _shape_of(model, parallel.strategy, element_bytes)
        self._choice = _own(parallel.strategy)
        asked = candidates(self._shape, dictionary.hardware) if among is None else among
        every = dict.fromkeys((*asked, self._choice))
        self._legal = [choice for choice in every if _is_legal(parallel.strategy, choice)]
        # key and predictions of the last step: the next one will be much like it
        self._seen: tuple[Key, Predicted] | None = None
        self._key: Key | None = None  # of the step before the current one: what its choice was made by
        self._is_cold = True  # the first step makes buffers and connections, and is no measure

    @property
    def candidates(self) -> tuple[Choice, ...]:
        """What it may take."""
        return tuple(self._legal)

    @property
    def choice(self) -> Choice:
        """What the layout has now."""
        return self._choice

    @property
    def is_warm(self) -> bool:
        """Whether a step like the last one has nothing left to try."""
        return self._seen is not None and self._is_warm(*self._seen)

    def before_step(self, model: nn.Module, parallel: Parallel) -> Parallel:
        """The layout of the next step, on every rank the same."""
        if self._seen is None:
            return parallel
        self._key, predicted = self._seen
        chosen = self.dictionary.choose(self._key, predicted)
        if chosen == self._choice:
            return parallel
        self._choice = chosen
        return parallel.switched(model, **vars(chosen))

    def after_step(self, seconds: float, stats: Sequence[MoEStats], passes: int) -> str:
        """Learn from a step of so many micro-batches that took this rank so long. Every rank calls it.

        Returns what was decided, if this step decided it; else nothing.
        """
        (slowest_s,) = self._world.largest([seconds])
        hardware, seen = self.dictionary.hardware, _workload(self._shape, stats, passes)
        own_key, predicted = self._seen = key_of(seen, hardware.name), predictions(seen, hardware, self._legal)
        if self._is_cold:
            self._is_cold = False
            return ""
        # what is known of a step before it runs is the step before it, so that is what its time is remembered by
        key = self._key or own_key
        if not alike(key, own_key):
            # a sudden change: the step was decided for other rows than it had
            return ""
        was_warm = self._is_warm(key, predicted)
        self.dictionary = self.dictionary.observed(key, self._choice, predicted, slowest_s)
        if was_warm or not self._is_warm(key, predicted):
            is_anew = was_warm and not self._is_warm(key, predicted)
            return "the time is off its record: the search begins anew" if is_anew else ""
        return f"about {seen.capacity:.0f} rows an expert: {self.dictionary.choose(key, predicted)} is the fastest"

    def _is_warm(self, key: Key, predicted: Predicted) -> bool:
        return is_warm(self.dictionary.entries.get(key, Entry()), predicted, self.dictionary.rules)


def dictionary_for(
    parallel: Parallel, device: torch.device, known: str, name: str, rules: Rules | None = None
) -> Dictionary:
    """The dictionary that `known` holds, the text of the file `name`, or of a machine that is measured now.

    Every rank calls it; the first one's text counts. What was learned on another machine stays in the file and is not
    used here, for its keys name that machine.
    Raises: ConfigError if the text is not a dictionary.
    """
    world = parallel.world
    # what ranks would each find for themselves may differ, and a measurement needs all of them
    text, name_here = world.first((known, hardware_name(world, device)))
    assert parallel.groups.experts is not None
    found = Dictionary.from_json(text, name) if text else None
    if found is not None and found.hardware.name == name_here:
        return found
    measured = Dictionary(hardware=probe(world, parallel.groups.experts, device), rules=rules or Rules())
    return measured if found is None else replace(measured, entries=found.entries, rules=found.rules)


def _shape_of(model: nn.Module, strategy: Strategy, element_bytes: int) -> LayerShape:
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers or strategy.ep * strategy.etp == 1:
        raise ConfigError(
            f"strategy.ep={strategy.ep}, etp={strategy.etp}: nothing to tune without experts that ranks "
            "share; nearest legal: ep=2"
        )
    config, experts = layers[0].config, layers[0].experts
    assert isinstance(experts, FFNExperts)
    return LayerShape(
        num_experts=config.num_experts,
        top_k=max(1, round(config.router.choices)),
        dim=experts.dim,
        hidden=config.hidden,
        gated=experts.activation.gated,
        ep=strategy.ep,
        etp=strategy.etp,
        element_bytes=element_bytes,
    )


def _workload(shape: LayerShape, stats: Sequence[MoEStats], passes: int) -> Workload:
    """A step's layers on average, and the least even of them."""
    sent = [(each.assigned_E - each.dropped_capacity_E - each.dropped_policy_E).tolist() for each in stats]
    means = [max(sum(loads) / len(loads), 1e-9) for loads in sent]
    skew = max(max(loads) / mean for loads, mean in zip(sent, means, strict=True))
    return Workload(shape=shape, capacity=sum(means) / len(means) / passes, skew=max(1.0, skew))


def _own(strategy: Strategy) -> Choice:
    return Choice(adaptive_r=strategy.expert_parts, overlap=strategy.overlap, alltoall=strategy.alltoall)


def _is_legal(strategy: Strategy, choice: Choice) -> bool:
    try:
        changed = replace(strategy, **vars(choice))
        check_supported(changed)
        check_shards(changed, has_experts=True)
    except ConfigError:
        return False
    return True
