"""Causal self-attention: the table of its kinds, and the common one, with grouped queries."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from turnout.config import Settings
from turnout.errors import ConfigError
from turnout.layers.attend import attend
from turnout.layers.kv_cache import KVCache
from turnout.layers.norm import RMSNorm
from turnout.layers.products import OWN_PRODUCTS, Products
from turnout.layers.rope import Yarn, rope_tables, rotate
from turnout.registry import Table
from turnout.tensors import fill_normal


class AttentionKind(Settings, ABC):
    """A row of the attention table: settings without the model's width; `build` adds it."""

    TABLE: ClassVar[Table[type["AttentionKind"]]] = Table("attention kind")
    needs_rope: ClassVar[bool] = False  # part of its work is to turn: it cannot do with learned positions

    @abstractmethod
    def build(self, dim: int, *, layer: int, init_std: float, norm_eps: float) -> nn.Module:
        """The attention of block `layer`; called as `Attention.forward` is."""

    @abstractmethod
    def rope(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables of these positions, shared by all blocks."""

    @abstractmethod
    def window_of(self, layer: int) -> int:
        """Tokens a query of block `layer` sees, itself included; 0: all before it."""

    @property
    @abstractmethod
    def flops_per_pair(self) -> int:
        """Floating-point operations for one query to meet one key: two products over all heads."""

    @property
    @abstractmethod
    def kept_per_token(self) -> int:
        """Numbers a token leaves for the backward pass, apart from the layer's input."""


@AttentionKind.TABLE.register("gqa")
@dataclass(frozen=True, kw_only=True)
class AttentionConfig(AttentionKind):
    """Settings of grouped-query attention."""

    num_heads: int = 4  # query heads
    num_kv_heads: int = 4  # key and value heads; must divide num_heads
    head_dim: int = 64  # width of one head
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    yarn: Yarn | None = None  # stretch of the rotary positions past the trained length; none: no stretch
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of queries and keys: each head (Qwen3) or all (OLMoE)
    smear_keys: bool = False  # a key is a learned mix, one share a head, of its token's and that of the token before
    bias: bool = False  # queries, keys, values and output have biases
    sinks: bool = False  # each head has a logit that takes attention and gives nothing (GPT-OSS)
    window: int = 0  # tokens a windowed block sees, itself included; 0: no block is windowed
    full_every: int = 0  # with a window, every n-th block still sees all; 0: none does

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_heads", "num_kv_heads", "head_dim")
        require_at_least(0, self, "window", "full_every")
        require_theta(self.rope_theta)
        if self.num_heads % self.num_kv_heads:
            legal = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"attention.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; legal: {legal}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"attention.head_dim={self.head_dim} must be even for rotary positions")

    def build(self, dim: int, *, layer: int, init_std: float, norm_eps: float) -> nn.Module:
        return Attention(dim, self, window=self.window_of(layer), init_std=init_std, norm_eps=norm_eps)

    def rope(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return rope_tables(start, length, dim=self.head_dim, theta=self.rope_theta, yarn=self.yarn, device=device)

    def window_of(self, layer: int) -> int:
        sees_all = self.full_every > 0 and layer % self.full_every == self.full_every - 1
        return 0 if sees_all else self.window

    @property
    def flops_per_pair(self) -> int:
        return 4 * self.num_heads * self.head_dim

    @property
    def kept_per_token(self) -> int:
        # the projection, queries and keys turned (and normed), the heads' outputs
        turned = (2 if self.qk_norm == "none" else 3) * (self.num_heads + self.num_kv_heads)
        return (turned + self.num_heads + (2 if self.smear_keys else 1) * self.num_kv_heads) * self.head_dim


class Attention(nn.Module):
    """softmax(q k^T) v over the tokens before; queries, keys and values come from one matrix.

    Smeared keys let one layer find where the present token stood before and see what followed; without them it takes
    two layers that learn to work together, which small models learn late or never. Source: Olsson et al. 2022,
    In-context Learning and Induction Heads, arXiv:2209.11895, argument 2.
    """

    def __init__(
        self, dim: int, config: AttentionConfig, *, window: int = 0, init_std: float = 0.02, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.config, self.window, self.init_std = config, window, init_std
        self.products: Products = OWN_PRODUCTS
        self.scale = config.head_dim**-0.5 * (config.yarn.logit_scale if config.yarn else 1.0)
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (heads + 2 * kv_heads) * width
        self.qkv = nn.Parameter(torch.empty(rows, dim))
        self.out = nn.Parameter(torch.empty(dim, heads * width))
        self.qkv_bias = nn.Parameter(torch.empty(rows)) if config.bias else None
        self.out_bias = nn.Parameter(torch.empty(dim)) if config.bias else None
        self.smear_H = nn.Parameter(torch.empty(kv_heads)) if config.smear_keys else None
        self.sink_H = nn.Parameter(torch.empty(heads)) if config.sinks else None
        normed_heads = _NORM_HEADS[config.qk_norm]
        self.q_norm = RMSNorm(normed_heads(heads) * width, eps=norm_eps) if normed_heads else None
        self.k_norm = RMSNorm(normed_heads(kv_heads) * width, eps=norm_eps) if normed_heads else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_normal(self.qkv, self.init_std)
        fill_normal(self.out, self.init_std)
        for offset in (self.qkv_bias, self.out_bias, self.smear_H, self.sink_H):
            if offset is not None:
                nn.init.zeros_(offset)

    def reach(self, products: Products) -> None:
        """From here on the first and the last product are these, which know of other processes."""
        self.products = products

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        *,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Shapes: x_BSD (B, S, D); rope two (S, X / 2) or None; mask_BS (B, S) False = padding; returns (B, S, D)."""
        heads, kv_heads, width = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        (rows_BSG,) = self.products.into(x_BSD, (self.qkv, self.qkv_bias))
        batch, length, _ = rows_BSG.shape
        qkv = rows_BSG.view(batch, length, -1, width)
        # queries and keys turn together: one pass over one buffer
        qk = self._normed(qkv[:, :, : heads + kv_heads])
        q, k = (qk if rope is None else rotate(qk, rope)).transpose(1, 2).split([heads, kv_heads], dim=1)
        v = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        past = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if self.smear_H is not None:
            # padding after a past is refused by attend
            k = smear(k, self.smear_H, None if past else mask_BS)
        y = attend(q, k, v, scale=self.scale, past=past, window=self.window, mask_BS=mask_BS, sink_H=self.sink_H)
        y_BSG = y.transpose(1, 2).reshape(batch, length, heads * width)
        return self.products.out_of(y_BSG, (self.out, self.out_bias))

    def _normed(self, qk_BSHX: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk_BSHX
        parts = qk_BSHX.split([self.config.num_heads, self.config.num_kv_heads], dim=2)
        normed = (_norm_heads(part, norm) for part, norm in zip(parts, (self.q_norm, self.k_norm), strict=True))
        return torch.cat(tuple(normed), dim=2)


def smear(k_BHSX: Tensor, smear_H: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """s k_t + (1 - s) k_(t-1) with s = sigmoid(smear_H); the first token, and one after padding, keep their own key.

    Keys come as they are cached, each turned to its own position.
    Shapes: k_BHSX (B, H, S, X); smear_H (H,), 0 mixes evenly; mask_BS (B, S), False = padding; returns (B, H, S, X).
    """
    before = torch.sigmoid(-smear_H).to(k_BHSX.dtype)[:, None, None]
    if mask_BS is not None:
        before = before * mask_BS[:, None, :-1, None]
    later = k_BHSX[:, :, 1:]
    return torch.cat([k_BHSX[:, :, :1], later + before * (k_BHSX[:, :, :-1] - later)], dim=2)


def require_at_least(least: int, config: AttentionKind, *names: str) -> None:
    """Raises: ConfigError naming the first of these fields that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"attention.{name}={getattr(config, name)} must be at least {least}")


def require_theta(rope_theta: float) -> None:
    """Raises: ConfigError unless the base of the rotary frequencies is a finite number above 1."""
    if not 1 < rope_theta < math.inf:
        raise ConfigError(f"attention.rope_theta={rope_theta} must be above 1 and finite")


def _norm_heads(x_BSHX: Tensor, norm: RMSNorm) -> Tensor:
    """One norm over as many neighbouring heads as its weight is wide."""
    return norm(x_BSHX.reshape(*x_BSHX.shape[:2], -1, norm.weight_D.shape[0])).view(x_BSHX.shape)


# heads under one norm, given how many there are
_NORM_HEADS = {"none": None, "head": lambda heads: 1, "full": lambda heads: heads}
