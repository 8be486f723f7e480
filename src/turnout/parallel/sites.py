"""Where this process stands among the experts of each layer: losses are told, and what does not hold there is said."""

import warnings
from collections.abc import Mapping

from turnout.comm import Groups
from turnout.layers import MoE
from turnout.placement import Placement, Site
from turnout.strategy import Strategy


def site_of(num_experts: int, strategy: Strategy, groups: Groups) -> Site:
    """This process's place in a layer of so many experts; one of which it has a slice is near, wherever others are."""
    group = groups.experts
    if group is None:
        return Site.alone(num_experts)
    return Site(placement=Placement.even(num_experts, strategy.ep), node_size=group.mesh.local, rank=group.rank)


def stand(layers: Mapping[str, MoE], strategy: Strategy, groups: Groups) -> None:
    """Tell the losses of all layers, where ranks share the model; the first rank warns of what does not hold there.

    Raises: ConfigError if the settings of a loss say already where this process stands.
    """
    remarks = []
    for layer in layers.values():
        site = site_of(layer.config.num_experts, strategy, groups)
        if groups.world.size > 1:
            layer.stand(site)
        remarks += [part.remark(site) for part in (layer.config.router, *layer.config.losses)]
    for remark in dict.fromkeys(filter(None, remarks)):
        if groups.world.is_first:
            warnings.warn(remark, stacklevel=3)
