"""One transformer block: attention, then a dense or Mixture-of-Experts feed-forward network, both residual."""

import torch
from torch import Tensor, nn

from turnout.layers.kv_cache import KVCache
from turnout.layers.mlp import MLP
from turnout.layers.moe import MoE
from turnout.tensors import MoEOutput, MoEStats


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, *, attention: nn.Module, ffn: MLP | MoE, attention_norm: nn.Module, ffn_norm: nn.Module) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.ffn_norm = ffn_norm
        self.ffn = ffn

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        *,
        token_ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        generator: torch.Generator | None = None,
        step_stats: MoEStats | None = None,
    ) -> tuple[Tensor, MoEOutput | None]:
        """The block's output, and what its MoE layer reported (None for a dense one)."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, mask_BS=mask_BS, cache=cache, layer=layer)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MLP):
            return x_BSD + self.ffn(normed_BSD), None
        out = self.ffn(normed_BSD, mask=mask_BS, token_ids=token_ids_BS, generator=generator, step_stats=step_stats)
        return x_BSD + out.y, out
