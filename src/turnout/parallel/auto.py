"""A layout for the ranks there are, without being told one."""

from math import gcd

from turnout.comm import World, expert_mesh
from turnout.errors import ConfigError
from turnout.strategy import Strategy


def auto_strategy(num_experts: int, hidden: int, world: World) -> Strategy:
    """Experts shared by all ranks, as far as they go: whole ones, or each sliced over the ranks there are for it.

    From there every r is a step away, so nothing of the experts' layout is left to choose; what to do with it the tuner
    finds out. `num_experts`, `hidden`: what those of all layers are multiples of; 0: there are none.
    Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, section 4.1.
    """
    ep = gcd(num_experts, world.size) if num_experts else 1
    for etp in range(world.size // ep if num_experts else 1, 1, -1):
        if hidden % etp == 0 and world.size % (ep * etp) == 0 and _fits(ep, etp, world):
            return Strategy(ep=ep, etp=etp)
    return Strategy(ep=ep) if _fits(ep, 1, world) else Strategy()


def _fits(ep: int, etp: int, world: World) -> bool:
    """Whether such groups end where nodes do."""
    try:
        expert_mesh(etp, world.local_size, "etp")
        expert_mesh(ep, max(1, world.local_size // etp))
    except ConfigError:
        return False
    return True
