"""How large a model is, how much it computes, and about how much memory training takes."""

from dataclasses import dataclass

import torch

from turnout.models.decoder import Decoder, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameter counts and FLOPs of a decoder."""

    total: int  # parameters
    active: int  # parameters a token meets: all but the routed experts it is not sent to
    embedding: int  # of these, token embeddings and head
    flops_per_token: int  # forward
    train_flops_per_token: int  # forward and backward


def sizes(config: ModelConfig) -> ModelSize:
    """Counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = Decoder(config)
    total = sum(p.numel() for p in model.parameters())
    routed = [sum(p.numel() for p in moe.experts.parameters()) for _, moe in model.moe_blocks()]
    shares = [moe.config.router.choices / moe.config.num_experts for _, moe in model.moe_blocks()]
    active = total - sum(round(n * (1 - share)) for n, share in zip(routed, shares, strict=True))
    embedding = model.embedding_VD.numel() + (0 if model.head_VD is None else model.head_VD.numel())
    matmul = active - embedding + config.vocab_size * config.dim
    forward = 2 * matmul
    return ModelSize(
        total=total, active=active, embedding=embedding, flops_per_token=forward, train_flops_per_token=3 * forward
    )


def train_memory_bytes(config: ModelConfig, batch_size: int, seq_len: int) -> int:
    """An estimate: weights, gradients and two moments in float32, and the activations backward needs."""
    size = sizes(config)
    tokens = batch_size * seq_len
    activations = tokens * config.num_layers * 34 * config.dim * 4
    return 16 * size.total + activations
