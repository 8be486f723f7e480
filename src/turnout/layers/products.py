"""The matrix products at the two ends of a layer, which ranks that share the layer put their own in the place of."""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F

Linear = tuple[Tensor, Tensor | None]  # weight (out, in), bias (out,)


class Products(ABC):
    """How a layer's input meets its first weights, and what it made of it the last one."""

    @abstractmethod
    def into(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        """x W^T + b for each of these. Shapes: x (..., D); each (..., out), of more tokens where ranks gather them."""

    @abstractmethod
    def out_of(self, y: Tensor, linear: Linear) -> Tensor:
        """y W^T + b. Shapes: y (..., in); returns (..., D), of fewer tokens where ranks scatter them."""


class OwnProducts(Products):
    """Those of a layer that one process has whole."""

    def into(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, *linear) for linear in linears)

    def out_of(self, y: Tensor, linear: Linear) -> Tensor:
        return F.linear(y, *linear)


OWN_PRODUCTS = OwnProducts()
