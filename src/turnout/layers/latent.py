"""Latent experts: routed experts work in a narrower space than the model's, so that their rows are cheap to send."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.tensors import fill_normal


class Latent(nn.Module):
    """The two projections around the routed experts, shared by all of them: x -> down x, y -> up y; no biases.

    Router and shared expert see the full width. Source: Elango et al. 2026, arXiv:2601.18089 (LatentMoE).
    """

    def __init__(self, dim: int, latent_dim: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.init_std = init_std
        self.down_ZD = nn.Parameter(torch.empty(latent_dim, dim))
        self.up_DZ = nn.Parameter(torch.empty(dim, latent_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.down_ZD, self.init_std)
        fill_normal(self.up_DZ, self.init_std)

    def down(self, x_TD: Tensor, mask_T: Tensor | None) -> Tensor:
        """Shapes: x_TD (T, D); mask_T (T,), False = padding; returns (T, Z)."""
        if mask_T is not None:
            # padding may hold NaN, and the weight's gradient would multiply it by zero
            x_TD = x_TD.masked_fill(~mask_T.unsqueeze(1), 0)
        return F.linear(x_TD, self.down_ZD.to(x_TD.dtype))

    def up(self, y_TZ: Tensor) -> Tensor:
        """Shapes: y_TZ (T, Z); returns (T, D); rows of zeros stay zeros."""
        return F.linear(y_TZ, self.up_DZ.to(y_TZ.dtype))
