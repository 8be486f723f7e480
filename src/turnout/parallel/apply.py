"""A strategy applied to a model: expert weights are cut, and their layers get a dispatcher that reaches the others."""

from math import gcd
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from turnout.comm import ExpertGroup, Groups, Ledger, TensorGroup, World, make_groups
from turnout.comm.world import current_world
from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.experts.cut import Cut
from turnout.layers import MoE
from turnout.models import Decoder
from turnout.parallel.auto import auto_strategy
from turnout.parallel.dense_cuts import DenseCut
from turnout.parallel.expert_parallel import ExpertParallel
from turnout.parallel.fully_sharded import shard_fully, shardings
from turnout.parallel.layout import Parallel
from turnout.parallel.own_targets import OwnTargets
from turnout.parallel.reach import dispatcher_of, moe_layers, prefix_of, sending_own
from turnout.parallel.shards import Shards
from turnout.parallel.sites import first_placement, stand
from turnout.parallel.stage_cut import check_stages
from turnout.parallel.stages import cut_stages
from turnout.parallel.supported import check_shards, check_supported
from turnout.parallel.tensor_parallel import Fusion, check_dense, share_dense
from turnout.parallel.tokens import Tokens
from turnout.strategy import Strategy

TIMEOUT_S = 600.0


def apply(
    model: nn.Module,
    strategy: Strategy | Literal["auto"],
    *,
    world: World | None = None,
    timeout_s: float = TIMEOUT_S,
    cuda: bool = False,
) -> Parallel:
    """Cut experts over `strategy.ep` times `etp` ranks, attention and dense layers over `tp`, and make all groups.

    The whole model, equal on all ranks, goes in; build the optimizer after. Every rank of the process group calls it;
    `world` tells how many ranks a node has (None: as torchrun says). With ep=etp=1 the layers stay as they are, and
    never communicate. Gradients are then those of this rank's tokens: `reduce_gradients` makes them the step's.
    With `expert_copies` the first experts have copies until `moved` or a `Rebalancer` gives them to others.
    Losses that ask which experts are near are told; the first rank warns where the groups of a router or of a loss are
    not the devices or nodes that they stand for.
    With tp every rank of a group of neighbours calls the model with the same tokens, and gets the same output.
    With pp a rank keeps its stages of a Decoder, and no longer calls the model, but `stages` of what is returned.
    "auto" shares the experts over all ranks, as far as they go, in the layout from which a `Tuner` reaches the others.
    Raises: ConfigError if the strategy does not fit the ranks or the model, or is not in this version.
    """
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ConfigError(
                f"{name} is on the meta device: give the model's weights values, then apply; or build a decoder in "
                "parts, by turnout.parallel.build"
            )
    return lay_out(model, strategy, world=world, timeout_s=timeout_s, device="cuda" if cuda else "cpu")


def lay_out(
    model: nn.Module,
    strategy: Strategy | Literal["auto"],
    *,
    world: World | None,
    timeout_s: float,
    device: str,
) -> Parallel:
    """The same of a model that may have no values yet; `device`: where it will have them."""
    world = current_world() if world is None else world
    layers = dict(moe_layers(model))
    if strategy == "auto":
        sizes = [(layer.config.num_experts, layer.config.hidden) for layer in layers.values()]
        strategy = auto_strategy(gcd(*(number for number, _ in sizes)), gcd(*(hidden for _, hidden in sizes)), world)
    resolved = _resolved(strategy, world, layers)
    if resolved.tp > 1:
        check_dense(model, resolved.tp, sequence_parallel=resolved.sequence_parallel)
    check_stages(model, resolved)
    groups = make_groups(resolved, world, timeout_s=timeout_s, cuda=device == "cuda")
    stand(layers, resolved, groups)
    ledger = Ledger()
    stages = cut_stages(model, groups, resolved, ledger)
    layers = dict(moe_layers(model))
    cuts = {} if groups.experts is None else _shared(layers, groups.experts, resolved, ledger)
    tensor, dense = groups.tensor, dict[str, DenseCut]()
    if tensor is not None:
        dense = _share_dense(model, tensor, ledger, resolved, device)
        for name, layer in layers.items():
            layer.reach(sending_own(name, layer.dispatcher, resolved, tensor, ledger))
    if groups.sharded:
        shard_fully(model, groups, resolved, cuts, ledger, device)
    each = world.size // resolved.pp
    first = world.rank // each * each
    return Parallel(
        strategy=resolved,
        groups=groups,
        shards=Shards(
            cuts=cuts | dense,
            group=groups.experts,
            has_first=_has_first(groups, first),
            shardings=shardings(model),
            tensor=tensor,
            first=first,
            elsewhere=frozenset() if stages is None else stages.elsewhere,
            tied=frozenset() if stages is None else stages.tied,
        ),
        ledger=ledger,
        stages=stages,
    )


def _has_first(groups: Groups, first: int) -> bool:
    """Whether whole tensors are put together here, at the first of the ranks with the same blocks."""
    wires = [
        *([] if groups.experts is None else [groups.experts.whole]),
        *([] if groups.tensor is None else [groups.tensor.wire]),
    ]
    return all(first in dist.get_process_group_ranks(wire) for wire in wires) if wires else groups.world.rank == first


def _shared(layers: dict[str, MoE], group: ExpertGroup, strategy: Strategy, ledger: Ledger) -> dict[str, Cut]:
    """Cut the experts of all layers; returns the names of the cut parameters, and who has which part."""
    found = {}
    for name, layer in layers.items():
        assert isinstance(layer.experts, FFNExperts)
        cuts = layer.experts.cuts(first_placement(layer.config.num_experts, strategy), strategy.etp)
        share = dispatcher_of(name, strategy, group, cuts, ledger)
        layer.share_experts(share, cuts, group.place)
        found |= {prefix_of(name) + own: cut for own, cut in cuts.items()}
    return found


def _share_dense(
    model: nn.Module, tensor: TensorGroup, ledger: Ledger, strategy: Strategy, device: str
) -> dict[str, DenseCut]:
    """Attention and dense layers over ranks, and of a decoder the loss too."""
    tokens = Tokens(tensor.size) if strategy.sequence_parallel else None
    if isinstance(model, Decoder):
        # in the place of the method, for whoever calls it: what weighs its parts counts a rank's own targets
        vars(model)["loss"] = OwnTargets(model, tensor.size, tensor.place, tokens)
    return share_dense(model, tensor, ledger, tokens, Fusion.of(strategy, tensor, torch.device(device)))


def _resolved(strategy: Strategy, world: World, layers: dict[str, MoE]) -> Strategy:
    check_supported(strategy)
    num_experts = 0 if not layers else _first(layers).config.num_experts
    resolved = strategy.check(world.size, num_experts=num_experts, uneven=True)
    for name, layer in layers.items():
        strategy.check(world.size, num_experts=layer.config.num_experts, uneven=True)
        _check_layer(name or "the layer", layer, resolved)
    check_shards(resolved, has_experts=bool(layers))
    return resolved


def _check_layer(name: str, layer: MoE, strategy: Strategy) -> None:
    shared = isinstance(layer.dispatcher, ExpertParallel)
    if shared or (isinstance(layer.experts, FFNExperts) and layer.experts.num_experts != layer.config.num_experts):
        raise ConfigError(f"{name} is laid out already: apply a strategy once, to the whole model")
    if strategy.ep == strategy.etp == 1:
        return
    field = f"strategy.ep={strategy.ep}" if strategy.ep > 1 else f"strategy.etp={strategy.etp}"
    if not isinstance(layer.experts, FFNExperts):
        raise ConfigError(
            f"{field}: the experts of {name} are modules of your own, or quantised, which only this process can "
            "hold; nearest legal: 1, or an expert kind by name"
        )
    if layer.experts.hidden != layer.config.hidden:
        raise ConfigError(f"{name} is laid out already: apply a strategy once, to the whole model")
    # every layer is checked before the first is cut
    layer.experts.cuts(first_placement(layer.config.num_experts, strategy), strategy.etp)


def _first(layers: dict[str, MoE]) -> MoE:
    return next(iter(layers.values()))
