"""About how much memory a training step takes.

An estimate of the bytes in tensors, within 25 % of those counted for small models on CPU (tests/paths/test_sizes.py);
what the process, its libraries and a fragmented allocator take comes on top.
"""

from dataclasses import dataclass

import torch

from turnout.experts.activations import Activation
from turnout.layers.lm_loss import rows_at_a_time
from turnout.layers.moe import MoEConfig
from turnout.models.decoder import ModelConfig
from turnout.models.size import sizes

_INDICES = 8  # int64 numbers per assignment that routing and dispatch keep


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes of one training step on one device, by what takes them."""

    parameters: int
    gradients: int
    moments: int  # AdamW's two
    activations: int  # kept by the forward pass for the backward pass, the loss's gradients among them
    workspace: int  # held besides for a moment: a layer's gradients, half of what it kept, or two chunks of logits

    @property
    def peak(self) -> int:
        """Activations shrink while gradients grow, layer by layer, so the larger of the two decides."""
        return self.parameters + self.moments + max(self.activations, self.gradients) + self.workspace


def train_memory(config: ModelConfig, batch_size: int, seq_len: int, device: torch.device) -> TrainMemory:
    """Estimate for a dropless model in float32 on that kind of device, nothing recomputed."""
    size, tokens = torch.float32.itemsize, batch_size * seq_len
    parameters = size * sizes(config).total
    sparse = set(config.moe_layers())
    layers = [_layer_bytes(config, size, sparse=layer in sparse) * tokens for layer in range(config.num_layers)]
    # final hidden states before and after the norm, and the loss's gradients of those and of the head
    head = size * (3 * config.dim * tokens + config.vocab_size * config.dim)
    held = min(tokens, rows_at_a_time(config.vocab_size, config.dim, device))
    logits = 2 * size * held * config.vocab_size
    return TrainMemory(
        parameters=parameters,
        gradients=parameters,
        moments=2 * parameters,
        activations=sum(layers) + head,
        workspace=max(logits, max(layers) // 2),
    )


def _layer_bytes(config: ModelConfig, size: int, *, sparse: bool) -> int:
    """Bytes a block keeps for a token: inputs of both norms and what they give, attention, FFN."""
    kept = 4 * config.dim + config.attention.kept_per_token
    if sparse and config.moe is not None:
        return size * kept + _moe_bytes(config.dim, config.moe, size)
    return size * (kept + _ffn_numbers(config.hidden, config.ffn))


def _moe_bytes(dim: int, moe: MoEConfig, size: int) -> int:
    """Rows in and out, what the experts keep, scores in float32, and indices."""
    row = 2 * dim + _ffn_numbers(moe.hidden, moe.expert)
    shared = _ffn_numbers(moe.shared_hidden, moe.expert)
    return size * (moe.router.choices * row + shared) + 4 * 3 * moe.num_experts + 8 * _INDICES * moe.router.choices


def _ffn_numbers(hidden: int, kind: str) -> int:
    """Numbers before and after the activation."""
    return (3 if Activation.TABLE[kind].gated else 2) * hidden
