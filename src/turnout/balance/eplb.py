"""EPLB, the expert-parallel load balancer of DeepSeek: the published baseline, which looks at loads alone.

Source: https://github.com/deepseek-ai/EPLB, written anew from its description. In three steps, each greedy: groups of
experts go to nodes, so that a token limited to some groups reaches few nodes; within a node the heaviest expert, by its
load over its copies, gets one more copy until all places are taken; the copies go to the ranks of the node. Both
packings take the heaviest first and give it to the lightest that has room. Where groups do not divide over nodes the
last two steps are done once for all ranks together.

Here experts need not divide over ranks: the first ranks then hold one more.
"""

from collections.abc import Iterator, Sequence

from turnout.errors import ConfigError
from turnout.topology import Mesh

Packs = list[list[int]]


def eplb(loads_E: Sequence[float], mesh: Mesh, *, groups: int = 1, redundant: int = 0) -> Packs:
    """The experts of each rank, in rising order; one with copies is in several lists, or more than once in one.

    `groups`: equal runs of neighbouring experts that stay on one node where nodes divide them; `redundant`: copies
    beyond one of each expert.
    Raises: ConfigError if the groups do not divide the experts, or a rank would hold none.
    """
    ranks: Packs = []
    for experts, copies, local in nodes_of(loads_E, mesh, groups=groups, redundant=redundant):
        copied = _copied([loads_E[expert] for expert in experts], len(experts) + copies)
        shares = [loads_E[experts[at]] / copied.count(at) for at in copied]
        ranks += [sorted(experts[copied[at]] for at in pack) for pack in _packed(shares, local)]
    return ranks


def nodes_of(
    loads_E: Sequence[float], mesh: Mesh, *, groups: int, redundant: int
) -> Iterator[tuple[list[int], int, int]]:
    """The first step: of each node its experts, how many copies it has, and its ranks; or of all ranks together.

    Raises: ConfigError if the groups do not divide the experts, or a rank would hold none.
    """
    num_experts = len(loads_E)
    if groups < 1 or num_experts % groups:
        raise ConfigError(f"groups={groups} must divide num_experts={num_experts}")
    if redundant < 0 or num_experts + redundant < mesh.size:
        raise ConfigError(
            f"redundant={redundant}: {num_experts} experts and as many copies must be at least one for each of the "
            f"{mesh.size} ranks; nearest legal: {max(0, mesh.size - num_experts)}"
        )
    nodes = mesh.nodes if groups % mesh.nodes == 0 and redundant % mesh.nodes == 0 else 1
    size = num_experts // groups
    group_loads = [sum(loads_E[group * size : (group + 1) * size]) for group in range(groups)]
    for packed in _packed(group_loads, nodes):
        experts = [group * size + at for group in sorted(packed) for at in range(size)]
        yield experts, redundant // nodes, mesh.size // nodes


def _packed(loads: Sequence[float], packs: int) -> Packs:
    """Indices in packs of equal size, as evenly loaded as taking the heaviest first makes them."""
    each, longer = divmod(len(loads), packs)
    room = [each + (pack < longer) for pack in range(packs)]
    found: Packs = [[] for _ in range(packs)]
    weight = [0.0] * packs
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        lightest = min((pack for pack in range(packs) if len(found[pack]) < room[pack]), key=lambda pack: weight[pack])
        found[lightest].append(item)
        weight[lightest] += loads[item]
    return found


def _copied(loads: Sequence[float], total: int) -> list[int]:
    """Every index once, then one more of whichever has the heaviest copies."""
    copies = list(range(len(loads)))
    number = [1] * len(loads)
    while len(copies) < total:
        heaviest = max(range(len(loads)), key=lambda at: loads[at] / number[at])
        copies.append(heaviest)
        number[heaviest] += 1
    return copies
