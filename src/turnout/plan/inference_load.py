"""What a forward pass of inference carries: sequences, their tokens, the keys these meet, and where keys are kept.

Source of latent attention's two forms: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from turnout.plan.model import ModelShape
from turnout.plan.serving import Serving
from turnout.strategy import ELEMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a pass carries through the model."""

    sequences: int  # of one data-parallel rank
    length: int  # tokens of each
    all_sequences: int  # of all ranks
    keys: Callable[[int], float]  # block -> keys that a query meets, on average
    cached: bool  # keys and values are read from the cache, not made in this pass

    @property
    def tokens(self) -> int:
        """Of one data-parallel rank."""
        return self.sequences * self.length


def decode_load(serving: Serving) -> Load:
    """One token of every sequence, half of the answer being there already."""
    length, shape = serving.context + serving.new_tokens // 2, serving.shape
    return Load(
        sequences=serving.rank_batch, length=1, all_sequences=serving.batch, cached=True,
        keys=lambda block: shape.keys_per_query(block, length, causal=False),
    )  # fmt: skip


def prefill_load(serving: Serving) -> Load:
    """The prompts that every data-parallel rank takes at once."""
    shape, each = serving.shape, min(serving.prefill_batch, serving.rank_batch)
    everywhere = min(serving.batch, each * serving.layout.dp)
    return Load(
        sequences=each, length=serving.context, all_sequences=everywhere, cached=False,
        keys=lambda block: shape.keys_per_query(block, serving.context, causal=True),
    )  # fmt: skip


def cache_bytes_per_token(serving: Serving) -> float:
    """Bytes of keys and values that one device keeps of one token in one block.

    Latent attention keeps one vector that all heads share, on every tensor-parallel rank; grouped queries keep two of
    each key head, a head being whole on some rank.
    """
    shape, tp, element = serving.shape, serving.layout.tp, ELEMENT_BYTES[serving.kv_precision]
    if shape.mla is not None:
        return element * (shape.mla.kv_rank + shape.mla.rope_dim)
    return element * 2 * ceil(shape.num_kv_heads / tp) * shape.head_dim


def cached_flops_per_pair(shape: ModelShape) -> float:
    """Operations for one query to meet one cached key over all heads; latent keys and values are met as they are."""
    if shape.mla is None:
        return shape.attention_flops_per_pair
    return 2 * shape.num_heads * (2 * shape.mla.kv_rank + shape.mla.rope_dim)


def plain(precision: str) -> str:
    """The precision of products that low precision leaves alone: the router, the output matrix."""
    return "bf16" if ELEMENT_BYTES[precision] < 2 else precision
