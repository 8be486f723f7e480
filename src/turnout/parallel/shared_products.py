"""The products at the ends of a layer that tensor-parallel ranks share: what is summed, gathered and scattered there."""

from torch import Tensor
from torch.nn import functional as F

from turnout.comm import TensorWire
from turnout.layers.products import Linear, Products
from turnout.parallel.tokens import Tokens


class SummedProducts(Products):
    """Every rank has all tokens, and what its heads or columns give is a part of a sum."""

    def __init__(self, wire: TensorWire) -> None:
        self._wire = wire

    def into(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, *linear) for linear in linears)

    def out_of(self, y: Tensor, linear: Linear) -> Tensor:
        weight, bias = linear
        return _added(self._wire.sum(F.linear(y, weight)), bias)


class ScatteredProducts(Products):
    """A rank has tokens of its own outside of the layer, and those of all ranks inside."""

    def __init__(self, wire: TensorWire, tokens: Tokens) -> None:
        self._wire, self._tokens = wire, tokens

    def into(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        cut = self._tokens.now
        whole = self._wire.gather(x, cut.lengths, dim=cut.dim)
        return tuple(F.linear(whole, *linear) for linear in linears)

    def out_of(self, y: Tensor, linear: Linear) -> Tensor:
        cut, (weight, bias) = self._tokens.now, linear
        return _added(self._wire.scatter_sum(F.linear(y, weight), cut.lengths, dim=cut.dim), bias)


def _added(y: Tensor, bias: Tensor | None) -> Tensor:
    """Once: the ranks of a sum have the same bias."""
    return y if bias is None else y + bias.to(y.dtype)
