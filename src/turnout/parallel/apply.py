"""A strategy applied to a model: expert weights are cut, and their layers get a dispatcher that reaches the others."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from turnout.alltoall import PROGRAMS
from turnout.comm import ExpertGroup, Groups, Ledger, World, make_groups
from turnout.comm.world import current_world
from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.layers import MoE
from turnout.parallel.expert_parallel import ExpertParallel
from turnout.parallel.shards import ExpertShards
from turnout.parallel.supported import check_supported
from turnout.placement import Placement
from turnout.strategy import Strategy

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a model lies on the ranks of a job, and what their collectives need."""

    strategy: Strategy  # dp is filled in
    groups: Groups
    shards: ExpertShards  # which tensors are slices, by name
    ledger: Ledger  # what expert layers sent

    @property
    def world(self) -> World:
        return self.groups.world

    def slices(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of which this rank has a slice."""
        return [parameter for name, parameter in model.named_parameters() if name in self.shards.placements]

    def take_sent(self) -> dict[str, float] | None:
        """Bytes and messages that expert layers sent since the last call, by class of link; None with ep=1."""
        experts = self.groups.experts
        if experts is None:
            return None
        sent = vars(self.ledger.traffic(experts.rank, experts.mesh))
        self.ledger.clear()
        return dict(sent)

    def over_experts(self, value: float) -> float:
        """A number added up over the ranks that share the experts."""
        return self.shards.total(value)


def apply(
    model: nn.Module,
    strategy: Strategy,
    *,
    world: World | None = None,
    timeout_s: float = TIMEOUT_S,
    cuda: bool = False,
) -> Parallel:
    """Cut the experts of every MoE layer over `strategy.ep` neighbouring ranks, and make all groups.

    The whole model, equal on all ranks, goes in; build the optimizer after. Every rank of the process group calls it;
    `world` tells how many ranks a node has (None: all are on one). With ep=1 the layers stay as they are, and never
    communicate. Gradients are then those of this rank's tokens: `reduce_gradients` makes them the step's.
    Raises: ConfigError if the strategy does not fit the ranks or the model, or is not in this version.
    """
    world = current_world() if world is None else world
    layers = dict(_moe_layers(model))
    resolved = _resolved(strategy, world, layers)
    groups = make_groups(resolved, world, timeout_s=timeout_s, cuda=cuda)
    ledger = Ledger()
    placements = {} if groups.experts is None else _shared(layers, groups.experts, resolved, ledger)
    return Parallel(
        strategy=resolved,
        groups=groups,
        shards=ExpertShards(placements=placements, group=groups.experts, has_first=world.rank < resolved.ep),
        ledger=ledger,
    )


def _shared(layers: dict[str, MoE], group: ExpertGroup, strategy: Strategy, ledger: Ledger) -> dict[str, Placement]:
    """Cut the experts of all layers; returns the names of the cut parameters, and who has which part."""
    placements = {}
    for name, layer in layers.items():
        placement = Placement.even(layer.config.num_experts, strategy.ep)
        program = PROGRAMS[strategy.alltoall]
        share = ExpertParallel(program, group, placement, ledger=ledger, layer=name or "the layer")
        layer.share_experts(share, placement.experts_of(group.rank))
        prefix = f"{name}.experts." if name else "experts."
        placements |= {prefix + own: placement for own, _ in layer.experts.named_parameters()}
    return placements


def _moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


def _resolved(strategy: Strategy, world: World, layers: dict[str, MoE]) -> Strategy:
    check_supported(strategy)
    resolved = strategy.check(world.size, num_experts=0 if not layers else _first(layers).config.num_experts)
    for name, layer in layers.items():
        strategy.check(world.size, num_experts=layer.config.num_experts)
        if resolved.ep > 1 and not isinstance(layer.experts, FFNExperts):
            raise ConfigError(
                f"strategy.ep={resolved.ep}: the experts of {name or 'the layer'} are modules of your own, which only "
                "this process can hold; nearest legal: 1, or an expert kind by name"
            )
        if isinstance(layer.experts, FFNExperts) and layer.experts.num_experts != layer.config.num_experts:
            raise ConfigError(f"{name or 'the layer'} is laid out already: apply a strategy once, to the whole model")
        if resolved.ep > 1 and any(weight.is_meta for weight in layer.experts.parameters()):
            raise ConfigError(f"{name or 'the layer'} is on the meta device: give its weights values, then apply")
    return resolved


def _first(layers: dict[str, MoE]) -> MoE:
    return next(iter(layers.values()))
