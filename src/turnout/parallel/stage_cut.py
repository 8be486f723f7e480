"""A decoder cut into pipeline stages from outside: a rank keeps the blocks of its own, and of the ends their tables.

Blocks keep their numbers, and tensors their names, so a checkpoint of stages is one of the whole model.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from turnout.errors import ConfigError
from turnout.models import Decoder, ModelConfig
from turnout.plan.pipeline import cut_evenly
from turnout.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class StageCut:
    """Which blocks lie where: stage s is with rank s % ranks of the pipeline."""

    layers: tuple[range, ...]  # of each stage, in order
    ranks: int
    place: int  # which of them this process is

    @property
    def own(self) -> tuple[int, ...]:
        """The stages of this rank."""
        return tuple(range(self.place, len(self.layers), self.ranks))

    @property
    def has_first(self) -> bool:
        """Whether tokens enter here."""
        return self.place == 0

    @property
    def has_last(self) -> bool:
        """Whether the loss is taken here."""
        return self.place == self.ranks - 1


def cut_of(config: ModelConfig, strategy: Strategy, place: int) -> StageCut:
    """Stages as equal as they get, those in the middle being longer: as the planner counts them."""
    sizes = cut_evenly(config.num_layers, strategy.pp * strategy.virtual_stages)
    ends = list(accumulate(sizes))
    layers = tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))
    return StageCut(layers=layers, ranks=strategy.pp, place=place)


def check_stages(model: nn.Module, strategy: Strategy) -> None:
    """Raises: ConfigError if the model cannot be cut so, by a strategy whose dp is known."""
    if strategy.pp == 1:
        return
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"strategy.pp={strategy.pp} cuts a Decoder into stages; {type(model).__name__} is none; nearest legal: 1"
        )
    if any(isinstance(block, Elsewhere) for block in model.blocks):
        raise ConfigError("the model is laid out already: apply a strategy once, to the whole model")
    config = model.config
    num_experts = config.moe.num_experts if config.moe is not None and config.moe_layers() else 0
    strategy.check(strategy.world(), num_experts=num_experts, num_layers=config.num_layers, uneven=True)


class Elsewhere(nn.Module):
    """Stands for a layer that another rank has."""

    ffn = None  # a block without experts


def keep_own(model: Decoder, cut: StageCut) -> frozenset[str]:
    """Let go of what other ranks have, and return the names of those tensors.

    Tied to the head, the matrix that reads tokens is on the first and on the last rank.
    """
    whole = set(model.state_dict())
    kept = {layer for stage in cut.own for layer in cut.layers[stage]}
    for layer in set(range(model.config.num_layers)) - kept:
        model.blocks[layer] = Elsewhere()
    if not (cut.has_first or (cut.has_last and model.config.tie_embeddings)):
        model.register_parameter("embedding_VD", None)
    if not cut.has_first:
        model.position_SD = None
    if not cut.has_last:
        model.head_VD, model.norm = None, Elsewhere()
    model.register_forward_pre_hook(_refuse)
    return frozenset(whole - set(model.state_dict()))


def _refuse(model: nn.Module, args: tuple[Any, ...]) -> None:
    raise ConfigError(
        "this rank has some stages of the model, and a pass goes through all of them: call parallel.stages.forward or "
        ".train with the micro-batches, on every rank"
    )
