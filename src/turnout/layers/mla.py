"""Multi-head latent attention: keys and values of all heads are read from one small vector a token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.errors import ConfigError
from turnout.layers.attend import attend
from turnout.layers.attention import AttentionKind, require_at_least, require_theta
from turnout.layers.kv_cache import KVCache
from turnout.layers.norm import RMSNorm
from turnout.layers.products import OWN_PRODUCTS, Products
from turnout.layers.rope import Yarn, rope_tables, rotate
from turnout.tensors import fill_normal


@AttentionKind.TABLE.register("mla")
@dataclass(frozen=True, kw_only=True)
class MLAConfig(AttentionKind):
    """Settings of multi-head latent attention. Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1."""

    needs_rope: ClassVar[bool] = True
    num_heads: int = 4  # heads
    q_rank: int = 0  # width of the vector queries are read from; 0: straight from the hidden state
    kv_rank: int = 128  # width of the vector keys and values are read from, which is what the cache holds
    nope_dim: int = 64  # width of a head's part without position
    rope_dim: int = 32  # width of a head's part that turns; its key is shared by all heads
    v_dim: int = 64  # width of a head's value
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    yarn: Yarn | None = None  # stretch of the rotary positions past the trained length; none: no stretch

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_heads", "kv_rank", "nope_dim", "rope_dim", "v_dim")
        require_at_least(0, self, "q_rank")
        require_theta(self.rope_theta)
        if self.rope_dim % 2:
            raise ConfigError(f"attention.rope_dim={self.rope_dim} must be even for rotary positions")

    def build(self, dim: int, *, layer: int, init_std: float, norm_eps: float) -> nn.Module:
        return MLA(dim, self, init_std=init_std, norm_eps=norm_eps)

    def rope(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return rope_tables(start, length, dim=self.rope_dim, theta=self.rope_theta, yarn=self.yarn, device=device)

    def window_of(self, layer: int) -> int:
        return 0

    @property
    def flops_per_pair(self) -> int:
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.v_dim)

    @property
    def kept_per_token(self) -> int:
        # small vectors before and after their norms; per head query, key, value and output, as wide as the key
        small = 2 * (self.q_rank + self.kv_rank + self.rope_dim)
        return small + self.num_heads * (4 * (self.nope_dim + self.rope_dim) + self.nope_dim + self.v_dim)


class MLA(nn.Module):
    """Attention whose cache holds kv_rank + rope_dim numbers a token, whatever the number of heads.

    Without a past, keys and values of every head are computed; with one, the heads' matrices are applied to the
    query and the output instead, so that the cached vectors are attended as they are.
    A rotary pair is (i, i + rope_dim / 2); DeepSeek's checkpoints have (2i, 2i + 1): reorder those rows on import.
    """

    def __init__(self, dim: int, config: MLAConfig, *, init_std: float = 0.02, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.config, self.init_std = config, init_std
        self.products: Products = OWN_PRODUCTS
        head_width = config.nope_dim + config.rope_dim
        self.scale = head_width**-0.5 * (config.yarn.logit_scale if config.yarn else 1.0)
        self.q_down = nn.Parameter(torch.empty(config.q_rank, dim)) if config.q_rank else None
        self.q_norm = RMSNorm(config.q_rank, eps=norm_eps) if config.q_rank else nn.Identity()
        self.q_up = nn.Parameter(torch.empty(config.num_heads * head_width, config.q_rank or dim))
        self.kv_down = nn.Parameter(torch.empty(config.kv_rank + config.rope_dim, dim))
        self.kv_norm = RMSNorm(config.kv_rank, eps=norm_eps)
        self.kv_up = nn.Parameter(torch.empty(config.num_heads * (config.nope_dim + config.v_dim), config.kv_rank))
        self.out = nn.Parameter(torch.empty(dim, config.num_heads * config.v_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.q_down, self.q_up, self.kv_down, self.kv_up, self.out):
            if weight is not None:
                fill_normal(weight, self.init_std)

    def reach(self, products: Products) -> None:
        """From here on the first and the last product are these, which know of other processes."""
        self.products = products

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Shapes: x_BSD (B, S, D); rope two (S, rope_dim / 2); mask_BS (B, S) False = padding; returns (B, S, D)."""
        first_q = self.q_up if self.q_down is None else self.q_down
        low_BSG, kv_BSG = self.products.into(x_BSD, (first_q, None), (self.kv_down, None))
        batch, length, _ = kv_BSG.shape
        q_nope, q_rope = self._queries(low_BSG, rope)
        latent, k_rope = kv_BSG.split([self.config.kv_rank, self.config.rope_dim], dim=2)
        # one head that all query heads share: (B, 1, S, kv_rank + rope_dim)
        shared = torch.cat([self.kv_norm(latent).unsqueeze(2), rotate(k_rope.unsqueeze(2), rope)], dim=3).transpose(
            1, 2
        )
        past = 0 if cache is None else cache.length
        if cache is not None:
            (shared,) = cache.append(layer, shared)
        attended = self._from_latent if past else self._from_heads
        y_BHSX = attended(q_nope, q_rope, shared, past=past, mask_BS=mask_BS)
        return self.products.out_of(y_BHSX.transpose(1, 2).reshape(batch, length, -1), (self.out, None))

    def _queries(self, low_BSG: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Shapes: low_BSG (B, S, q_rank), or the queries already."""
        q_BSG = low_BSG if self.q_down is None else F.linear(self.q_norm(low_BSG), self.q_up)
        q = q_BSG.view(*low_BSG.shape[:2], self.config.num_heads, -1)
        q_nope, q_rope = q.split([self.config.nope_dim, self.config.rope_dim], dim=3)
        return q_nope.transpose(1, 2), rotate(q_rope, rope).transpose(1, 2)

    def _from_heads(
        self, q_nope: Tensor, q_rope: Tensor, shared: Tensor, *, past: int, mask_BS: Tensor | None
    ) -> Tensor:
        """Keys and values of every head from the shared vectors, then plain attention: the way to train."""
        config = self.config
        latent, k_rope = shared.split([config.kv_rank, config.rope_dim], dim=3)
        kv = F.linear(latent.squeeze(1), self.kv_up).view(
            len(latent), -1, config.num_heads, config.nope_dim + config.v_dim
        )
        k_nope, v = kv.transpose(1, 2).split([config.nope_dim, config.v_dim], dim=3)
        k = torch.cat([k_nope, k_rope.expand(-1, config.num_heads, -1, -1)], dim=3)
        q = torch.cat([q_nope, q_rope], dim=3)
        return attend(q, k, v, scale=self.scale, past=past, mask_BS=mask_BS)

    def _from_latent(
        self, q_nope: Tensor, q_rope: Tensor, shared: Tensor, *, past: int, mask_BS: Tensor | None
    ) -> Tensor:
        """The heads' matrices moved to query and output: no key or value of a head is ever made."""
        config = self.config
        up = self.kv_up.view(config.num_heads, -1, config.kv_rank)
        up_k, up_v = up.split([config.nope_dim, config.v_dim], dim=1)
        q = torch.cat([q_nope @ up_k, q_rope], dim=3)
        y = attend(q, shared, shared, scale=self.scale, past=past, mask_BS=mask_BS)
        return y[..., : config.kv_rank] @ up_v.transpose(1, 2)
