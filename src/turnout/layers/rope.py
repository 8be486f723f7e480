"""Rotary positions, and YaRN's stretch of them to longer sequences."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turnout.errors import ConfigError
from turnout.tensors import first_order


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Stretches rotary positions: fast frequencies stay, slow ones are divided by `factor`, a ramp between them.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2 to 3.4.
    """

    factor: float = 32.0  # longest sequence over the trained one
    trained_length: int = 4096  # longest sequence before the stretch, in tokens
    fast: float = 32.0  # turns over trained_length from which a frequency stays
    slow: float = 1.0  # turns over trained_length up to which it is divided by factor
    whole_dims: bool = True  # the ramp begins and ends at a whole dimension (`truncate` in Hugging Face)

    def __post_init__(self) -> None:
        if self.factor < 1 or self.trained_length < 1 or not 0 < self.slow < self.fast:
            raise ConfigError(
                f"yarn.factor={self.factor} and trained_length={self.trained_length} must be at least 1, "
                f"and 0 < slow={self.slow} < fast={self.fast}"
            )

    @property
    def logit_scale(self) -> float:
        """Factor on attention logits; scaling queries and keys by its root, as many codes do, is the same."""
        return (0.1 * math.log(self.factor) + 1) ** 2

    def kept(self, dim: int, theta: float) -> Tensor:
        """Share of each frequency that stays: (dim / 2,), 1 for fast ones to 0 for slow ones."""

        def dim_of(turns: float) -> float:
            return dim * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dim_of(self.fast), dim_of(self.slow)
        if self.whole_dims:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        position = torch.arange(dim // 2, dtype=torch.float32)
        return 1 - ((position - low) / max(high - low, 0.001)).clamp(0, 1)


def rope_tables(
    start: int, length: int, *, dim: int, theta: float, yarn: Yarn | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions start .. start + length - 1 for heads that turn `dim` of their width.

    Shapes: returns two (length, dim / 2) float32. Source: Su et al. 2021, arXiv:2104.09864.
    """
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    frequency = theta**-exponent
    if yarn is not None:
        kept = yarn.kept(dim, theta).to(device)
        frequency = frequency * (kept + (1 - kept) / yarn.factor)
    position = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotate(x_BSHX: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair (x_i, x_{i + X/2}) turned by its angle.

    Shapes: x_BSHX (B, S, H, X); rope two (S, X / 2); returns (B, S, H, X), contiguous.
    """
    return _Rotate.apply(x_BSHX, *rope) if torch.is_grad_enabled() else _rotate(x_BSHX, *rope)


class _Rotate(torch.autograd.Function):
    """Backward turns the gradient back: nothing but the angles is saved."""

    @staticmethod
    def forward(ctx: Any, x_BSHX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BSHX, cos, sin)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x_BSHX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table.to(x_BSHX.dtype)[:, None, :] for table in (cos, sin))
    # laid out for every head: rows of all heads are one long loop, where half a head is a very short one
    cos_SHX = torch.cat([cos, cos], dim=-1).expand(-1, x_BSHX.shape[2], -1).contiguous()
    turned = torch.empty(x_BSHX.shape, dtype=x_BSHX.dtype, device=x_BSHX.device)
    torch.mul(x_BSHX, cos_SHX, out=turned)
    left, right = x_BSHX.chunk(2, dim=-1)
    turned_left, turned_right = turned.chunk(2, dim=-1)
    turned_left.addcmul_(right, sin, value=-1)
    turned_right.addcmul_(left, sin)
    return turned
