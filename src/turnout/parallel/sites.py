"""Where this process stands among the experts of each layer: losses are told, and what does not hold there is said."""

import warnings
from collections.abc import Mapping

from turnout.balance import copied
from turnout.comm import ExpertGroup, Groups
from turnout.layers import MoE
from turnout.placement import Placement, Site
from turnout.strategy import Strategy
from turnout.topology import Mesh


def first_placement(num_experts: int, strategy: Strategy) -> Placement:
    """Where the experts of a layer lie at first: in order, and while no load is known the first ones have the copies.

    Raises: ConfigError if a rank would hold none, or copies have no room.
    """
    if not strategy.expert_copies:
        return Placement.even(num_experts, strategy.ep)
    alike = Mesh(nodes=1, local=strategy.ep)
    return copied([1.0] * num_experts, alike, copies=strategy.expert_copies)


def site_of(num_experts: int, strategy: Strategy, groups: Groups) -> Site:
    """This process's place in a layer of so many experts; one of which it has a slice is near, wherever others are."""
    if groups.experts is None:
        return Site.alone(num_experts)
    return site_in(groups.experts, first_placement(num_experts, strategy))


def site_in(group: ExpertGroup, placement: Placement) -> Site:
    """The same where the experts lie so."""
    return Site(placement=placement, node_size=group.mesh.local, rank=group.rank)


def remarks_of(layer: MoE, site: Site) -> list[str]:
    """What of a layer's settings does not hold there, in sentences."""
    found = [part.remark(site) for part in (layer.config.router, *layer.config.losses)]
    return [remark for remark in found if remark]


def stand(layers: Mapping[str, MoE], strategy: Strategy, groups: Groups) -> None:
    """Tell the losses of all layers, where ranks share the model; the first rank warns of what does not hold there.

    Raises: ConfigError if the settings of a loss say already where this process stands.
    """
    remarks = []
    for layer in layers.values():
        site = site_of(layer.config.num_experts, strategy, groups)
        if groups.world.size > 1:
            layer.stand(site)
        remarks += remarks_of(layer, site)
    for remark in dict.fromkeys(remarks):
        if groups.world.is_first:
            warnings.warn(remark, stacklevel=3)
