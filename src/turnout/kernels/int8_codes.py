"""Weights as codes of 8 bits, in the order the kernel reads them; one layout on every machine."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# of int8_tile.h: inner columns that share a scale; outer columns that lie together; inner columns multiplied at once
GROUP, PANEL, QUAD = 32, 32, 4


class FFNCodes(NamedTuple):
    """Of E feed-forward networks; those of the first product have an axis of parts, gate and up, after E."""

    up_codes: Tensor
    up_scales: Tensor
    up_bases: Tensor
    down_codes: Tensor
    down_scales: Tensor
    down_bases: Tensor


def encode_ffn(up_EDG: Tensor, down_EFD: Tensor) -> FFNCodes:
    """Codes and scales of both products."""
    hidden = down_EFD.shape[1]
    # each part begins a panel, and ends with a group of the second product
    parts = torch.stack([F.pad(part, (0, -hidden % GROUP)) for part in up_EDG.split(hidden, dim=2)], dim=1)
    up = (tensor.unflatten(0, parts.shape[:2]) for tensor in encode(parts.flatten(0, 1)))
    return FFNCodes._make([*up, *encode(down_EFD)])


def decode_ffn(codes: FFNCodes, *, dim: int, hidden: int) -> tuple[Tensor, Tensor]:
    """up_EDG and down_EFD as the codes have them, float32."""
    ups = (tensor.unbind(1) for tensor in codes[:3])
    parts = [decode(*part, inner=dim, outer=hidden) for part in zip(*ups, strict=True)]
    return torch.cat(parts, dim=2), decode(*codes[3:], inner=hidden, outer=dim)


def encode(weight_EIO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and bases of weights for x @ weight: weight = base * scale * (code - zero).

    A scale and a zero, of a byte each, for each 32 rows of each column; a base for each column, its largest scale.
    Shapes: weight_EIO (E, inner, outer); codes (E, outer / 32, inner / 32, 8, 32, 4) uint8, scales (E, outer / 32,
    inner / 32, 2, 32) uint8 (scale, then zero), bases (E, outer / 32, 32) bfloat16; sizes rounded up, and what is
    beyond the weight stands for zero.
    """
    _, inner, outer = weight_EIO.shape
    full = F.pad(weight_EIO.float(), (0, -outer % PANEL, 0, -inner % GROUP))
    groups = full.unflatten(1, (-1, GROUP)).unflatten(3, (-1, PANEL))  # (E, groups, GROUP, panels, PANEL)
    groups = groups.permute(0, 3, 1, 2, 4)
    low, high = groups.amin(dim=3).clamp(max=0), groups.amax(dim=3).clamp(min=0)
    # a code less than there are: zero is a whole number, which moves the range by half of one
    wanted = (high - low) / 254
    base = _not_below(wanted.amax(dim=2))
    wide = base.float().unsqueeze(2)
    scale_code = torch.searchsorted(_fractions(), (wanted / wide).nan_to_num(0.0).contiguous())
    scale = wide * _fractions()[scale_code]
    zero = (-low / scale).nan_to_num(0.0).round()
    codes = (groups / scale.unsqueeze(3)).nan_to_num(0.0).add(zero.unsqueeze(3)).round().clamp(0, 255).to(torch.uint8)
    codes = codes.unflatten(3, (-1, QUAD)).transpose(-1, -2).contiguous()
    return codes, torch.stack([scale_code, zero], dim=3).to(torch.uint8), base


def decode(codes: Tensor, scales: Tensor, bases: Tensor, *, inner: int, outer: int) -> Tensor:
    """The weights that codes, scales and bases stand for: (E, inner, outer) float32."""
    rows = codes.transpose(-1, -2).flatten(3, 4).float()  # (E, panels, groups, GROUP, PANEL)
    scale_code, zero = scales.unsqueeze(3).unbind(4)
    scale = bases.float()[:, :, None, None] * _fractions()[scale_code.long()]
    return (scale * (rows - zero.float())).permute(0, 2, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :inner, :outer]


def _fractions() -> Tensor:
    """What each byte of a scale stands for, ascending: four bits of exponent, four of fraction, and 1 for 240."""
    code = torch.arange(256)
    return (1 + (code % 16) / 16) * 2.0 ** (code // 16 - 15)


def _not_below(value: Tensor) -> Tensor:
    """In bfloat16, rounded up: a range must hold every weight."""
    rounded = value.to(torch.bfloat16)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < value, above, rounded)
