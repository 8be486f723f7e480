"""A decoder-only transformer with dense and Mixture-of-Experts blocks."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.config import Settings
from turnout.errors import ConfigError, ShapeError
from turnout.experts.activations import Activation
from turnout.layers.attention import AttentionConfig, AttentionKind
from turnout.layers.block import Block
from turnout.layers.kv_cache import KVCache
from turnout.layers.lm_loss import lm_loss
from turnout.layers.mlp import MLP
from turnout.layers.moe import MoE, MoEConfig
from turnout.layers.norm import NORMS
from turnout.tensors import Assignment, LossTerm, MoEOutput, MoEStats, Routed, total_loss

# far beyond any model, and small enough that no product of sizes is beyond 64 bits
MOST = {"vocab_size": 1 << 24, "dim": 1 << 20, "num_layers": 1000, "max_seq_len": 1 << 30, "hidden": 1 << 20}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Settings of a decoder; everything but the machine."""

    vocab_size: int = 4096  # tokens the model knows; the tokenizer must have as many
    dim: int = 256  # model width
    num_layers: int = 4  # transformer blocks
    max_seq_len: int = 1024  # longest sequence of training and generation, in tokens
    attention: AttentionKind = AttentionConfig()  # attention of every block: gqa, mla
    positions: Literal["rope", "learned"] = "rope"  # queries and keys turn, or each position has a vector of its own
    hidden: int = 1024  # hidden width of a dense block's feed-forward network
    ffn: str = "swiglu"  # kind of a dense feed-forward network: swiglu, gelu, relu
    ffn_bias: bool = False  # dense feed-forward networks have biases
    moe: MoEConfig | None = None  # the experts; none: every block is dense
    dense_first: int = 0  # this many first blocks stay dense
    moe_every: int = 1  # every n-th block after them has experts, counting so that the last one has
    tie_embeddings: bool = True  # one matrix reads and writes tokens
    norm: str = "rms"  # normalisation before attention, before the FFN and at the end: rms, layer
    norm_eps: float = 1e-6  # added to the mean square or variance in a norm
    init_std: float = 0.02  # standard deviation of initial weights; what adds to the residual gets / sqrt(2 layers)

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be from 1 to {most}")
        if not 0 < self.norm_eps < math.inf:
            raise ConfigError(f"model.norm_eps={self.norm_eps} must be above 0 and finite")
        if not 0 <= self.init_std < math.inf:
            raise ConfigError(f"model.init_std={self.init_std} must be at least 0 and finite")
        if not 0 <= self.dense_first <= self.num_layers:
            raise ConfigError(f"model.dense_first={self.dense_first} must be in 0..{self.num_layers} (num_layers)")
        if self.moe_every < 1:
            raise ConfigError(f"model.moe_every={self.moe_every} must be at least 1")
        for table, name in ((NORMS, self.norm), (Activation.TABLE, self.ffn)):
            if name not in table:
                table[name]
        if self.positions == "learned" and self.attention.needs_rope:
            kind = AttentionKind.TABLE.name_of(type(self.attention))
            raise ConfigError(f"attention {kind!r} turns a part of each head: it needs model.positions='rope'")
        if self.moe is not None and self.moe_layers():
            self.moe.router.check_decoder()
            self.moe.capacity.check_decoder(self.moe.router, self.moe.num_experts)

    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks that have experts."""
        if self.moe is None:
            return ()
        sparse = range(self.dense_first, self.num_layers)
        return tuple(i for i in sparse if (i - self.dense_first) % self.moe_every == self.moe_every - 1)


@dataclass(frozen=True, kw_only=True)
class DecoderOutput:
    """What a pass returns: final hidden states, and what each MoE layer reported, in layer order."""

    h_BSD: Tensor
    routed: tuple[Routed, ...]

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        """Auxiliary terms of all layers."""
        return tuple(term for routed in self.routed for term in routed.losses)

    @property
    def stats(self) -> tuple[MoEStats, ...]:
        """What each MoE layer did with its tokens, computed when first asked for."""
        return tuple(routed.stats for routed in self.routed)

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """Who was to go where in each MoE layer."""
        return tuple(routed.decided[0] for routed in self.routed)

    @property
    def keeps(self) -> tuple[Tensor | None, ...]:
        """Which of these were sent; None: every one. Shapes: (N,) bool each."""
        return tuple(routed.decided[1] for routed in self.routed)


@dataclass(frozen=True, kw_only=True)
class DecoderLoss:
    """Main loss and auxiliary terms, apart; `total` is what is trained on."""

    main: Tensor
    losses: tuple[LossTerm, ...]
    stats: tuple[MoEStats, ...]

    @property
    def total(self) -> Tensor:
        return self.main + total_loss(self.losses).to(self.main.device)


class Decoder(nn.Module):
    """Token ids to next-token logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_VD = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        learned = config.positions == "learned"
        self.position_SD = nn.Parameter(torch.empty(config.max_seq_len, config.dim)) if learned else None
        self.blocks = nn.ModuleList(build_block(config, layer=i) for i in range(config.num_layers))
        self.norm = NORMS[config.norm](config.dim, eps=config.norm_eps)
        self.head_VD = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights from the default generator; all of them, so a model from the meta device is whole after."""
        if self.embedding_VD.is_meta:
            return
        for _, module in self.in_turn():
            self.draw(module)

    def in_turn(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of those that have tensors of their own, in the order in which initial weights are drawn."""
        named = [("", self), *self.blocks.named_modules(prefix="blocks"), ("norm", self.norm)]
        return ((name, module) for name, module in named if callable(getattr(module, "reset_parameters", None)))

    @torch.no_grad()
    def draw(self, module: nn.Module) -> None:
        """Initial weights of one of those modules, from the default generator."""
        if module is self:
            for weight in (self.embedding_VD, self.position_SD, self.head_VD):
                if weight is not None:
                    nn.init.normal_(weight, std=self.config.init_std)
            return
        getattr(module, "reset_parameters")()  # noqa: B009 - modules have it, not nn.Module
        shrink = 1 / math.sqrt(2 * self.config.num_layers)
        for name, weight in module.named_parameters(recurse=False):
            if name in ("out", "down_DF", "down_EFD"):
                weight.mul_(shrink)

    @property
    def head(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        return self.embedding_VD if self.head_VD is None else self.head_VD

    def moe_blocks(self) -> tuple[tuple[str, MoE], ...]:
        """(name, layer) of every MoE layer, in order."""
        named = ((f"blocks.{i}", block.ffn) for i, block in enumerate(self.blocks))
        return tuple((name, ffn) for name, ffn in named if isinstance(ffn, MoE))

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        generator: torch.Generator | None = None,
        step_stats: Sequence[MoEStats] | None = None,
    ) -> DecoderOutput:
        """Shapes: tokens_BS (B, S) int64; mask_BS (B, S) bool, False = padding; h_BSD is normed, ready for `logits`.

        `step_stats`, one for each MoE layer: what the whole optimizer step does there, for losses of scope `global`.
        Raises: ShapeError past max_seq_len.
        """
        start = 0 if cache is None else cache.length
        length = tokens_BS.shape[1]
        if start + length > self.config.max_seq_len:
            raise ShapeError(f"{start + length} tokens are more than model.max_seq_len={self.config.max_seq_len}")
        x_BSD, reports = self.run_blocks(
            self.embed(tokens_BS, start=start),
            tokens_BS,
            range(self.config.num_layers),
            mask_BS=mask_BS,
            cache=cache,
            generator=generator,
            step_stats=step_stats,
        )
        if cache is not None:
            cache.length += length
        return DecoderOutput(h_BSD=self.norm(x_BSD), routed=tuple(report.routed for report in reports))

    def embed(self, tokens_BS: Tensor, *, start: int = 0) -> Tensor:
        """What the first block gets, of tokens at positions from `start` on. Shapes: returns (B, S, D)."""
        x_BSD = F.embedding(tokens_BS, self.embedding_VD)
        if self.position_SD is None:
            return x_BSD
        return x_BSD + self.position_SD[start : start + tokens_BS.shape[1]]

    def run_blocks(
        self,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        layers: Sequence[int],
        *,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        generator: torch.Generator | None = None,
        step_stats: Sequence[MoEStats] | None = None,
    ) -> tuple[Tensor, list[MoEOutput]]:
        """What these blocks make of x, one after another, and what those with experts report.

        `step_stats`: as in `forward`, for those among `layers`.
        Shapes: x_BSD and the result (B, S, D); tokens_BS and mask_BS (B, S).
        """
        start, length = 0 if cache is None else cache.length, tokens_BS.shape[1]
        learned = self.config.positions == "learned"
        rope = None if learned else self.config.attention.rope(start, length, x_BSD.device)
        reports: list[MoEOutput] = []
        whole = itertools.repeat(None) if step_stats is None else iter(step_stats)
        for layer in layers:
            block = self.blocks[layer]
            x_BSD, report = block(
                x_BSD,
                rope,
                token_ids_BS=tokens_BS,
                mask_BS=mask_BS,
                cache=cache,
                layer=layer,
                generator=generator,
                step_stats=next(whole) if isinstance(block.ffn, MoE) else None,
            )
            if report is not None:
                reports.append(report)
        return x_BSD, reports

    def logits(self, h: Tensor) -> Tensor:
        """Shapes: h (..., D); returns (..., V)."""
        return F.linear(h, self.head)

    def loss(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        *,
        mask_BS: Tensor | None = None,
        generator: torch.Generator | None = None,
        step_stats: Sequence[MoEStats] | None = None,
    ) -> DecoderLoss:
        """Mean next-token cross-entropy over targets that are not -100, with the layers' auxiliary terms."""
        out = self(tokens_BS, mask_BS=mask_BS, generator=generator, step_stats=step_stats)
        main = lm_loss(out.h_BSD.flatten(0, 1), self.head, targets_BS.flatten())
        return DecoderLoss(main=main, losses=out.losses, stats=out.stats)


def build_block(config: ModelConfig, *, layer: int) -> Block:
    """One block of a decoder, with initial weights of its own."""
    ffn: MLP | MoE
    if config.moe is not None and layer in config.moe_layers():
        ffn = MoE.from_config(config.dim, config.moe)
    else:
        ffn = MLP(config.dim, config.hidden, kind=config.ffn, bias=config.ffn_bias, init_std=config.init_std)
    return Block(
        attention=config.attention.build(config.dim, layer=layer, init_std=config.init_std, norm_eps=config.norm_eps),
        ffn=ffn,
        attention_norm=NORMS[config.norm](config.dim, eps=config.norm_eps),
        ffn_norm=NORMS[config.norm](config.dim, eps=config.norm_eps),
    )
