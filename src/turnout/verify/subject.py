"""What the suite asks of a layer under test: one thin adapter a library, as much as the library lets one see."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Expert = Callable[[Tensor], Tensor]


class NotApplicable(Exception):
    """The layer has no such thing, or does not show it; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes a subject is asked for; one whose sizes are its own ignores them."""

    dim: int = 16
    hidden: int = 24
    num_experts: int = 6
    k: int = 2


class Layer(ABC):
    """One built layer. What a method cannot tell raises NotApplicable."""

    def __init__(self, module: nn.Module, *, dim: int, num_experts: int) -> None:
        self.module = module
        self.dim = dim
        self.num_experts = num_experts

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y in the shape of x (..., D); mask (...) bool, False = padding."""

    def gates(self, x_TD: Tensor) -> Tensor:
        """Weight at which each expert's output enters each token's: (T, E), zero where a token does not go."""
        raise NotApplicable("shows no routing weights")

    def experts(self) -> list[Expert]:
        """Each expert as a function of rows, on the layer's own parameters."""
        raise NotApplicable("shows no single experts")

    def shared(self, x_TD: Tensor) -> Tensor:
        """What every token gets besides its experts."""
        return torch.zeros_like(x_TD)

    def expert_parameters(self) -> Mapping[str, Tensor]:
        """Parameters of all experts, expert by expert along the first axis."""
        raise NotApplicable("shows no expert parameters")

    def router_parameters(self) -> Mapping[str, Tensor]:
        """Parameters of the router."""
        raise NotApplicable("shows no router parameters")

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The balance loss of one call, its coefficient included."""
        raise NotApplicable("has no auxiliary loss")

    def counts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Choices per expert: (E,) int64."""
        raise NotApplicable("shows no load")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A kind of layer and how to build it."""

    name: str
    build: Callable[[Sizes], Layer]  # raises NotApplicable for sizes it cannot take
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries under test
    rounding: float = 0.0  # what a gate that computes in float32 by design, whatever it is given, may be off by

    def layer(self, sizes: Sizes, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Layer:
        """A layer with weights that matter: random, the same for every dtype, in evaluation mode."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = self.build(sizes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in layer.module.parameters():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        layer.module.to(dtype).eval()
        return layer
