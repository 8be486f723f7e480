"""Weights as codes of 8 bits, in the order the kernel reads them; one layout on every machine."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# of int8_tile.h: inner columns that share a scale; outer columns that lie together; inner columns multiplied at once
GROUP, PANEL, QUAD = 64, 32, 4


class FFNCodes(NamedTuple):
    """Of E feed-forward networks; those of the first product have an axis of parts, gate and up, after E."""

    up_codes: Tensor
    up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor


def encode_ffn(up_EDG: Tensor, down_EFD: Tensor) -> FFNCodes:
    """Codes and scales of both products."""
    hidden = down_EFD.shape[1]
    # each part begins a panel, and ends with a group of the second product
    parts = torch.stack([F.pad(part, (0, -hidden % GROUP)) for part in up_EDG.split(hidden, dim=2)], dim=1)
    up_codes, up_scales = (t.unflatten(0, parts.shape[:2]) for t in encode(parts.flatten(0, 1)))
    down_codes, down_scales = encode(down_EFD)
    return FFNCodes(up_codes=up_codes, up_scales=up_scales, down_codes=down_codes, down_scales=down_scales)


def decode_ffn(codes: FFNCodes, *, dim: int, hidden: int) -> tuple[Tensor, Tensor]:
    """up_EDG and down_EFD as the codes have them, float32."""
    parts = [
        decode(part, scales, inner=dim, outer=hidden)
        for part, scales in zip(codes.up_codes.unbind(1), codes.up_scales.unbind(1), strict=True)
    ]
    return torch.cat(parts, dim=2), decode(codes.down_codes, codes.down_scales, inner=hidden, outer=dim)


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
