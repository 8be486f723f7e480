"""How many parameters a model has, how many of them a token meets, and what it computes."""

from dataclasses import dataclass

import torch
from torch import nn

from turnout.errors import ConfigError
from turnout.models.decoder import Decoder, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters, and floating-point operations per token at one sequence length (a multiply-add counts as two).

    Published `active` counts differ by convention: Mixtral, Qwen3, OLMoE and DeepSeek print ours, embeddings and head
    included; OpenAI leaves out what is only looked up, which is `active - embedding`.
    """

    total: int  # parameters
    active: int  # parameters a token meets: all but the routed experts it does not choose
    routed: int  # of the total, parameters of routed experts
    embedding: int  # of the total, vectors that are only looked up: of tokens unless the head shares them, of positions
    seq_len: int  # tokens of the sequence the FLOPs are averaged over
    flops_per_token: int  # forward pass, attention included
    train_flops_per_token: int  # forward and backward pass, nothing recomputed


def sizes(config: ModelConfig, seq_len: int = 0) -> ModelSize:
    """Sizes, counted on a model of the meta device: nothing is allocated. `seq_len` 0 means the longest sequence.

    A router that gives tokens a varying number of experts counts with its largest.
    Raises: ConfigError if seq_len is not in 0 .. max_seq_len.
    """
    if not 0 <= seq_len <= config.max_seq_len:
        raise ConfigError(f"seq_len={seq_len} must be in 0..{config.max_seq_len} (model.max_seq_len; 0 takes it)")
    seq_len = seq_len or config.max_seq_len
    with torch.device("meta"):
        model = Decoder(config)
    routed = [
        (_numel(moe.experts), moe.config.router.choices / moe.config.num_experts) for _, moe in model.moe_blocks()
    ]
    idle = sum(round(numel * (1 - share)) for numel, share in routed)
    looked_up = [model.position_SD, None if model.head_VD is None else model.embedding_VD]
    forward = matmul_flops_per_token(model) + attention_flops_per_token(config, seq_len)
    return ModelSize(
        total=_numel(model),
        active=_numel(model) - idle,
        routed=sum(numel for numel, _ in routed),
        embedding=sum(weight.numel() for weight in looked_up if weight is not None),
        seq_len=seq_len,
        flops_per_token=forward,
        train_flops_per_token=3 * forward,
    )


def matmul_flops_per_token(model: Decoder) -> int:
    """Forward FLOPs of a token in products with weights: two for every weight it meets; biases, norms left out."""
    experts = {f"{name}.ffn.experts.": moe for name, moe in model.moe_blocks()}
    total = 0.0
    for name, weight in model.named_parameters():
        only_looked_up = name == "position_SD" or (name == "embedding_VD" and model.head_VD is not None)
        if weight.ndim < 2 or "bias" in name or only_looked_up:
            continue
        moe = next((moe for prefix, moe in experts.items() if name.startswith(prefix)), None)
        share = 1.0 if moe is None else moe.config.router.choices / moe.config.num_experts
        total += 2 * weight.numel() * share
    return round(total)


def attention_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward FLOPs of a token in products of queries, keys and values, averaged over a sequence.

    Only keys a query may see are counted, as in causal kernels; counting all of them, as some papers do, is twice that.
    """
    pairs = sum(_visible_pairs(seq_len, config.attention.window_of(layer)) for layer in range(config.num_layers))
    return round(config.attention.flops_per_pair * pairs / seq_len)


def _visible_pairs(seq_len: int, window: int) -> int:
    """Query-key pairs of one sequence: each token with itself and those before it, within the window."""
    full = min(window or seq_len, seq_len)
    return full * (full + 1) // 2 + (seq_len - full) * full


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
