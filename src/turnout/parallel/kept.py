"""What of experts lies on a rank: their weights, and what the optimizer keeps of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from turnout.errors import ConfigError
from turnout.experts.cut import Cut
from turnout.layers import MoE


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Tensors with a row for each expert of this rank: a weight, and what the optimizer keeps of it."""

    weight: nn.Parameter
    state: dict[str, Any]  # the optimizer's own
    names: tuple[str, ...]  # of those in it that have such rows

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight.detach(), *(self.state[name] for name in self.names))

    @property
    def element_bytes(self) -> int:
        """Of one number of the weight, and of those that belong to it."""
        return sum(each.element_size() for each in self.tensors())

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Take these in place of `tensors()`; where the number of rows is the same, where those lie."""
        for name, old, new in zip(("", *self.names), self.tensors(), tensors, strict=True):
            if old.shape == new.shape:
                old.copy_(new)
            elif name:
                self.state[name] = new
            else:
                self.weight.data = new


def kept_of(layer: MoE, cuts: Mapping[str, Cut], optimizer: Optimizer | None) -> dict[str, Kept]:
    """By the weights' own names, what of the experts of a layer lies here.

    Raises: ConfigError if there are gradients, or the optimizer keeps what belongs to no expert.
    """
    return {name: _kept_of(name, layer.experts.get_parameter(name), optimizer) for name in cuts}


def _kept_of(name: str, weight: nn.Parameter, optimizer: Optimizer | None) -> Kept:
    if weight.grad is not None:
        raise ConfigError(f"{name} has a gradient: experts move between steps; call optimizer.zero_grad() first")
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    rows = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}
    for key, value in rows.items():
        if value.shape != weight.shape:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for {name} of shape "
                f"{list(weight.shape)}: which expert's it is nobody knows; use one whose state is like the weights, "
                "such as AdamW or SGD"
            )
    return Kept(weight=weight, state=state, names=tuple(rows))


def expert_bytes(layer: MoE, cuts: Mapping[str, Cut], optimizer: Optimizer | None) -> list[int]:
    """What a rank has of one expert, by slice: weights, and what the optimizer keeps of them."""
    slices, kept = next(iter(cuts.values())).slices, kept_of(layer, cuts, optimizer)
    return [
        sum(math.prod(cuts[name].part_shape(at)[1:]) * each.element_bytes for name, each in kept.items())
        for at in range(slices)
    ]
