"""The dense feed-forward network: shared expert of a MoE layer, and the block's FFN where it has no experts."""

import torch
from torch import Tensor, nn

from turnout.experts.activations import Activation
from turnout.layers.products import OWN_PRODUCTS, Products
from turnout.tensors import fill_normal


class MLP(nn.Module):
    """down(act(up x)); `up` holds gate and up side by side when the activation is gated."""

    def __init__(
        self, dim: int, hidden: int, *, kind: str = "swiglu", bias: bool = False, init_std: float = 0.02
    ) -> None:
        super().__init__()
        self.activation = Activation.TABLE[kind]
        self.kind, self.init_std = kind, init_std
        self.products: Products = OWN_PRODUCTS
        width = 2 * hidden if self.activation.gated else hidden
        self.up_GD = nn.Parameter(torch.empty(width, dim))
        self.down_DF = nn.Parameter(torch.empty(dim, hidden))
        self.up_bias_G = nn.Parameter(torch.empty(width)) if bias else None
        self.down_bias_D = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.up_GD, self.init_std)
        fill_normal(self.down_DF, self.init_std)
        for bias in (self.up_bias_G, self.down_bias_D):
            if bias is not None:
                nn.init.zeros_(bias)

    def reach(self, products: Products) -> None:
        """From here on the first and the last product are these, which know of other processes."""
        self.products = products

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., D); returns (..., D)."""
        # weights follow the rows, as the experts' do
        up_bias, down_bias = (None if b is None else b.to(x.dtype) for b in (self.up_bias_G, self.down_bias_D))
        (up,) = self.products.into(x, (self.up_GD.to(x.dtype), up_bias))
        return self.products.out_of(self.activation(up), (self.down_DF.to(x.dtype), down_bias))
