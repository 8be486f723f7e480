"""Tensor parallelism, hung on a model from outside: ranks with the same tokens share attention and dense layers.

A rank has some heads, and a part of the hidden width; what its layers give is a part of a sum. Without sequence
parallel every rank has all tokens, and that sum is an all-reduce. With it a rank keeps, between those layers, tokens of
its own: whole sequences where ranks divide their number, else a piece of each. They are gathered where a shared layer
begins and summed into shares where it ends. In between a rank is like one with other text, which it routes by itself.
Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.

torch's parallelize_module is not used: its styles turn weights into DTensors, and our layers compute with autograd
functions of their own; its PrepareModuleInput takes the gradient of what is gathered for whole on each rank, which it
is not where weights are plain tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnout.comm import ChunkedProducts, Ledger, SymmetricProducts, TensorGroup, TensorWire, is_shared
from turnout.contracts import Loss
from turnout.errors import ConfigError
from turnout.layers import MoE
from turnout.layers.attention import Attention
from turnout.layers.block import Block
from turnout.layers.mla import MLA
from turnout.layers.mlp import MLP
from turnout.layers.products import Products
from turnout.models import Decoder
from turnout.parallel.dense_cuts import DenseCut, cut_layers, cuts_of, keep
from turnout.parallel.shared_products import FusedEnds, ScatteredProducts, SummedProducts
from turnout.parallel.tokens import Cutting, Tokens
from turnout.strategy import Strategy


def check_dense(model: nn.Module, ranks: int, *, sequence_parallel: bool) -> None:
    """Raises: ConfigError if these ranks cannot share the model's attention and dense layers."""
    if sequence_parallel and not isinstance(model, Decoder):
        raise ConfigError(
            f"strategy.sequence_parallel=True cuts the tokens of a Decoder; {type(model).__name__} is none; "
            "nearest legal: False"
        )
    layers = dict(cut_layers(model, shared_experts=not sequence_parallel))
    for name, layer in layers.items():
        cuts_of(name, layer, ranks)
    for name, block in ((name, module) for name, module in model.named_modules() if isinstance(module, Block)):
        if f"{name}.attention" not in layers:
            kind = type(block.attention).__name__
            raise ConfigError(f"strategy.tp={ranks}: no cut is known for the {kind} of {name}; nearest legal: tp=1")
        if isinstance(model, Decoder) and block.attention.config != model.config.attention:
            raise ConfigError(f"{name} is laid out already: apply a strategy once, to the whole model")


def share_dense(
    model: nn.Module, group: TensorGroup, ledger: Ledger, tokens: Tokens | None, fusion: "Fusion | None" = None
) -> dict[str, DenseCut]:
    """Cut the layers that ranks share and hang their sums on them; returns who has which part, by name.

    `tokens`: of sequence parallel; the dense network beside experts then stays whole: it computes a rank's own alone.
    `fusion`: how its gathers and sums hide behind products; None: they do not.
    """
    found: dict[str, DenseCut] = {}
    for name, layer in list(cut_layers(model, shared_experts=tokens is None)):
        cuts = cuts_of(name, layer, group.size)
        keep(layer, cuts, group.place, group.size)
        found |= {f"{name}.{own}": cut for own, cut in cuts.items()}
        wire = TensorWire(group=group, ledger=ledger, layer=name)
        assert isinstance(layer, Attention | MLA | MLP)
        layer.reach(_products(wire, tokens, fusion))
    if tokens is not None:
        assert isinstance(model, Decoder)
        _cut_tokens(model, tokens, TensorWire(group=group, ledger=ledger, layer="the model"))
    return found


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How the collectives of sequence parallel are fused with products."""

    chunks: int
    symmetric: bool  # the ranks' GPUs reach each other's memory

    @staticmethod
    def of(strategy: Strategy, group: TensorGroup, device: torch.device) -> "Fusion | None":
        """What a strategy asks for and the ranks of the group can do; all of them call it."""
        if strategy.tp_overlap == 1:
            return None
        return Fusion(chunks=strategy.tp_overlap, symmetric=is_shared(group, device))


def _products(wire: TensorWire, tokens: Tokens | None, fusion: Fusion | None) -> Products:
    if tokens is None:
        return SummedProducts(wire)
    if fusion is None:
        return ScatteredProducts(wire, tokens)
    symmetric = SymmetricProducts(wire=wire) if fusion.symmetric else None
    return FusedEnds(ChunkedProducts(wire=wire, chunks=fusion.chunks), symmetric, tokens)


def _cut_tokens(model: Decoder, tokens: Tokens, wire: TensorWire) -> None:
    """The first block gets a rank's own tokens, and the head gets all again; experts are told their mask and ids."""

    def own(value: Tensor | None) -> Tensor | None:
        return None if value is None else tokens.now.share(value, wire.group.place)

    def enter(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (own(args[0]), *args[1:])

    def tell(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert isinstance(layer, MoE)
        if torch.is_grad_enabled():
            check_sequences(layer.config.losses, tokens.now)
        return args, kwargs | {name: own(kwargs.get(name)) for name in ("mask", "token_ids")}

    def leave(norm: nn.Module, args: tuple[Any, ...], h_BSD: Tensor) -> Tensor:
        if tokens.stay_apart:
            return h_BSD
        return wire.gather(h_BSD, tokens.now.lengths, dim=tokens.now.dim)

    model.register_forward_pre_hook(tokens.begin, with_kwargs=True)
    model.blocks[0].register_forward_pre_hook(enter)
    for _, layer in model.moe_blocks():
        layer.register_forward_pre_hook(tell, with_kwargs=True)
    model.norm.register_forward_hook(leave)


def check_sequences(losses: Sequence[Loss], cut: Cutting) -> None:
    """Raises: ConfigError if a loss counts over sequences of which a rank has only pieces."""
    for loss in losses:
        if cut.dim == 1 and getattr(loss, "scope", "") == "sequence":
            raise ConfigError(
                f"strategy.sequence_parallel=True cuts every sequence, because tp={len(cut.lengths)} does not divide "
                f"their number, and {type(loss).__name__} counts over scope='sequence'; give each group of tp ranks a "
                "multiple of tp sequences, or take sequence_parallel=False"
            )
