"""The dispatchers of a model's layers, which reach the experts of other ranks."""

from collections.abc import Iterator, Mapping

from torch import nn

from turnout.comm import ExpertGroup, Ledger, TensorGroup, TensorWire
from turnout.contracts import Dispatcher
from turnout.experts.cut import Cut
from turnout.layers import MoE
from turnout.parallel.expert_parallel import ExpertParallel
from turnout.parallel.own_tokens import OwnTokens
from turnout.strategy import Strategy


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """(name, layer) of every MoE layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


def dispatcher_of(
    layer: str, strategy: Strategy, group: ExpertGroup, cuts: Mapping[str, Cut], ledger: Ledger
) -> ExpertParallel:
    """The dispatcher of a layer whose experts that group shares; `cuts` by the weights' own names."""
    return ExpertParallel(strategy, group, cuts, ledger=ledger, layer=layer or "the layer")


def sending_own(
    layer: str, dispatcher: Dispatcher, strategy: Strategy, tensor: TensorGroup | None, ledger: Ledger
) -> Dispatcher:
    """The dispatcher of a rank that has the tokens of others too, and is to send its share of them."""
    if tensor is None or not strategy.shard_tokens or strategy.sequence_parallel:
        return dispatcher
    return OwnTokens(dispatcher, TensorWire(group=tensor, ledger=ledger, layer=layer or "the layer"))


def prefix_of(layer: str) -> str:
    """What the names of a layer's expert weights begin with."""
    return f"{layer}.experts." if layer else "experts."


def layer_of(weight: str) -> str:
    """The layer of an expert weight by its name."""
    return weight.rpartition(".")[0].removesuffix("experts").removesuffix(".")
