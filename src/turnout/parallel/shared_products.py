"""The products at the ends of a layer that tensor-parallel ranks share, and what is summed or gathered there."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.comm import FusedProducts, TensorWire
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


class FusedEnds(Products):
    """The same, each gather and each sum under way while other rows are multiplied."""

    def __init__(self, chunked: FusedProducts, symmetric: FusedProducts | None, tokens: Tokens) -> None:
        """`symmetric`: for GPUs that reach each other's memory, whenever ranks have equally many rows."""
        self._chunked, self._symmetric, self._tokens = chunked, symmetric, tokens

    def into(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        rows, products = self._rows(x), self._products()
        with torch.autocast(x.device.type, enabled=False):
            weights = [weight.to(rows.x_ND.dtype) for weight, _ in linears]
            outs = products.into(rows.x_ND, weights, rows.lengths)
        return tuple(_added(rows.back(out), bias) for out, (_, bias) in zip(outs, linears, strict=True))

    def out_of(self, y: Tensor, linear: Linear) -> Tensor:
        rows, products, (weight, bias) = self._rows(y), self._products(), linear
        with torch.autocast(y.device.type, enabled=False):
            out = products.out_of(rows.x_ND, weight.to(rows.x_ND.dtype), rows.lengths)
        return _added(rows.back(out), bias)

    def _products(self) -> FusedProducts:
        even = len(set(self._tokens.now.lengths)) == 1
        return self._chunked if self._symmetric is None or not even else self._symmetric

    def _rows(self, x: Tensor) -> "_Rows":
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        first = x.to(dtype).movedim(self._tokens.now.dim, 0)
        inner = first.shape[1]
        lengths = tuple(length * inner for length in self._tokens.now.lengths)
        return _Rows(x_ND=first.flatten(0, 1), lengths=lengths, inner=inner, dim=self._tokens.now.dim)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Tokens as rows, those of a rank beside each other."""

    x_ND: Tensor
    lengths: tuple[int, ...]  # of each rank
    inner: int  # rows of one place along `dim`
    dim: int  # that tokens are cut along

    def back(self, out_NG: Tensor) -> Tensor:
        """Shapes: returns (B, S, G)."""
        return out_NG.unflatten(0, (len(out_NG) // self.inner, self.inner)).movedim(0, self.dim)


def _added(y: Tensor, bias: Tensor | None) -> Tensor:
    """Once: the ranks of a sum have the same bias."""
    return y if bias is None else y + bias.to(y.dtype)
