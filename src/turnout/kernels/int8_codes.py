"""Weights as codes of 8 bits, in the order the kernel reads them; one layout on every machine."""

import torch
from torch import Tensor
from torch.nn import functional as F

# of int8_tile.h: inner columns that share a scale; outer columns that lie together; inner columns multiplied at once
GROUP, PANEL, QUAD = 64, 32, 4


def encode(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of weights for x @ weight: weight = low + scale * code for each 64 rows of each column.

    Shapes: weight_EIO (E, inner, outer); codes (E, outer / 32, inner / 64, 16, 32, 4) uint8, scales (E, outer / 32,
    inner / 64, 2, 32) bfloat16 (scale, then low), sizes rounded up; what is beyond the weight stands for zero.
    """
    _, inner, outer = weight_EIO.shape
    full = F.pad(weight_EIO.float(), (0, -outer % PANEL, 0, -inner % GROUP))
    groups = full.unflatten(1, (-1, GROUP)).unflatten(3, (-1, PANEL))  # (E, groups, GROUP, panels, PANEL)
    groups = groups.permute(0, 3, 1, 2, 4)
    low = _not_above(groups.amin(dim=3, keepdim=True))
    scale = -_not_above(-(groups.amax(dim=3, keepdim=True) - low.float()) / 255)
    codes = ((groups - low.float()) / scale.float()).nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)
    codes = codes.unflatten(3, (-1, QUAD)).transpose(-1, -2).contiguous()
    return codes, torch.cat([scale, low], dim=3)


def decode(codes: Tensor, scales: Tensor, *, inner: int, outer: int) -> Tensor:
    """The weights that codes and scales stand for: (E, inner, outer) float32."""
    rows = codes.transpose(-1, -2).flatten(3, 4).float()  # (E, panels, groups, GROUP, PANEL)
    scale, low = scales.float().split(1, dim=3)
    return (low + scale * rows).permute(0, 2, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :inner, :outer]


def _not_above(value: Tensor) -> Tensor:
    """In bfloat16, rounded down: a range must hold every weight."""
    rounded = value.to(torch.bfloat16)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.float() > value, below, rounded)
