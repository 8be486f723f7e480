"""Causal self-attention with rotary positions, grouped queries and a key-value cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from turnout.errors import ConfigError, RequestError


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Settings of grouped-query attention."""

    num_heads: int = 4  # query heads
    num_kv_heads: int = 4  # key and value heads; must divide num_heads
    head_dim: int = 64  # width of one head
    rope_theta: float = 10_000.0  # base of the rotary frequencies

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"attention.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            legal = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"attention.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; legal: {legal}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"attention.head_dim={self.head_dim} must be even for rotary positions")


class KVCache:
    """Keys and values of the tokens seen so far, one pair of buffers a layer."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, k_BHSX: Tensor, v_BHSX: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; all of them so far come back.

        Raises: RequestError past max_length.
        """
        end = self.length + k_BHSX.shape[2]
        if end > self.max_length:
            raise RequestError(f"{end} tokens do not fit the key-value cache of max_length={self.max_length}")
        pair = self._layers[layer]
        if pair is None:
            shape = (*k_BHSX.shape[:2], self.max_length, k_BHSX.shape[3])
            pair = (k_BHSX.new_zeros(shape), v_BHSX.new_zeros(*shape[:3], v_BHSX.shape[3]))
            self._layers[layer] = pair
        for buffer, new in zip(pair, (k_BHSX, v_BHSX), strict=True):
            buffer[:, :, self.length : end] = new
        return pair[0][:, :, :end], pair[1][:, :, :end]


class Attention(nn.Module):
    """softmax(q k^T) v over the tokens before; queries, keys and values come from one matrix."""

    def __init__(self, dim: int, config: AttentionConfig, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        self.init_std = init_std
        self.qkv = nn.Parameter(torch.empty((heads + 2 * kv_heads) * width, dim))
        self.out = nn.Parameter(torch.empty(dim, heads * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.qkv, std=self.init_std)
        nn.init.normal_(self.out, std=self.init_std)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Shapes: x_BSD (B, S, D); rope two (S, X / 2); mask_BS (B, S) False = padding; returns (B, S, D)."""
        batch, length, _ = x_BSD.shape
        heads, kv_heads, width = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = F.linear(x_BSD, self.qkv).view(batch, length, -1, width)
        # queries and keys turn together: one pass over one buffer
        turned = _Rotate.apply(qkv[:, :, : heads + kv_heads], *rope)
        q, k = turned.transpose(1, 2).split([heads, kv_heads], dim=1)
        v = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        past = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(layer, k, v)
        allowed = _allowed(length, past, mask_BS, x_BSD.device)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None and length > 1, enable_gqa=heads != kv_heads
        )
        return F.linear(y.transpose(1, 2).reshape(batch, length, heads * width), self.out)


def rope_tables(start: int, length: int, config: AttentionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions start .. start + length - 1.

    Shapes: returns two (length, X / 2) float32. Source: Su et al. 2021, arXiv:2104.09864.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    position = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angle = torch.outer(position, config.rope_theta**-exponent)
    return angle.cos(), angle.sin()


class _Rotate(torch.autograd.Function):
    """Turns pairs (x_i, x_{i + X/2}) by their angles; backward turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x_BSHX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BSHX, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x_BSHX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table.to(x_BSHX.dtype)[:, None, :] for table in (cos, sin))
    left, right = x_BSHX.chunk(2, dim=-1)
    turned = torch.empty(x_BSHX.shape, dtype=x_BSHX.dtype, device=x_BSHX.device)
    turned_left, turned_right = turned.chunk(2, dim=-1)
    torch.mul(left, cos, out=turned_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=turned_right).addcmul_(left, sin)
    return turned


def _allowed(length: int, past: int, mask_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see, or None where plain causal attention says it all."""
    if mask_BS is None and (past == 0 or length == 1):
        return None
    allowed_SS = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    if mask_BS is None:
        return allowed_SS
    if past:
        raise RequestError("a padding mask together with a filled key-value cache is not supported; pad nothing")
    # a padding query may see itself: a row with no key at all would be NaN
    diagonal_SS = torch.eye(length, dtype=torch.bool, device=device)
    return (allowed_SS & mask_BS[:, None, None, :]) | diagonal_SS
