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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnout.comm import Ledger, TensorGroup, TensorWire
from turnout.contracts import Loss
from turnout.errors import ConfigError
from turnout.layers import MoE
from turnout.layers.block import Block
from turnout.models import Decoder
from turnout.parallel.dense_cuts import DenseCut, cut_layers, cuts_of, keep

_ADDED_BIAS = ("out_bias", "down_bias_D")


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How the tokens of a pass are cut over ranks."""

    dim: int  # 0: whole sequences; 1: pieces of each
    lengths: tuple[int, ...]  # of each rank's share along it

    def share(self, value: Tensor, rank: int) -> Tensor:
        """A rank's tokens; nothing is sent. Shapes: value (B, S, ...)."""
        return value.narrow(self.dim, sum(self.lengths[:rank]), self.lengths[rank])


def cutting(shape: tuple[int, ...], ranks: int) -> Cutting:
    """Shares of tokens of shape (B, S), equal but for one sequence piece's rest."""
    batch, length = shape[:2]
    if batch % ranks == 0:
        return Cutting(dim=0, lengths=(batch // ranks,) * ranks)
    return Cutting(dim=1, lengths=tuple((length + ranks - 1 - rank) // ranks for rank in range(ranks)))


class Tokens:
    """How the pass that runs cuts its tokens: blocks are told nothing that says so."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self.now = cutting((0, 0), ranks)
        self.stay_apart = False  # what comes out of the model is a rank's own share

    @staticmethod
    @contextmanager
    def kept_apart(tokens: "Tokens | None") -> Iterator[None]:
        """For a pass whose end needs a rank's own tokens alone."""
        if tokens is None:
            yield
            return
        tokens.stay_apart = True
        try:
            yield
        finally:
            tokens.stay_apart = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model: it is given all tokens."""
        self.now = cutting((args[0] if args else kwargs["tokens_BS"]).shape, self._ranks)


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


def share_dense(model: nn.Module, group: TensorGroup, ledger: Ledger, tokens: Tokens | None) -> dict[str, DenseCut]:
    """Cut the layers that ranks share and hang their sums on them; returns who has which part, by name.

    `tokens`: of sequence parallel; the dense network beside experts then stays whole: it computes a rank's own alone.
    """
    found: dict[str, DenseCut] = {}
    for name, layer in list(cut_layers(model, shared_experts=tokens is None)):
        cuts = cuts_of(name, layer, group.size)
        keep(layer, cuts, group.place, group.size)
        found |= {f"{name}.{own}": cut for own, cut in cuts.items()}
        wire = TensorWire(group=group, ledger=ledger, layer=name)
        _Shared(wire, tokens).hang(layer)
    if tokens is not None:
        assert isinstance(model, Decoder)
        _cut_tokens(model, tokens, TensorWire(group=group, ledger=ledger, layer="the model"))
    return found


class _Shared:
    """Around a layer that ranks share: its input is gathered, its output summed."""

    def __init__(self, wire: TensorWire, tokens: Tokens | None) -> None:
        self._wire, self._tokens = wire, tokens

    def hang(self, layer: nn.Module) -> None:
        if self._tokens is not None:
            layer.register_forward_pre_hook(self._gathered)
        layer.register_forward_hook(self._summed)

    def _gathered(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._tokens is not None
        cut = self._tokens.now
        return (self._wire.gather(args[0], cut.lengths, dim=cut.dim), *args[1:])

    def _summed(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        if self._tokens is None:
            total = self._wire.sum(y)
        else:
            total = self._wire.scatter_sum(y, self._tokens.now.lengths, dim=self._tokens.now.dim)
        for name in _ADDED_BIAS:
            bias = getattr(layer, name, None)
            if bias is not None:
                # every rank has added it
                total = total - (self._wire.group.size - 1) * bias.to(total.dtype)
        return total


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
