"""Copies of the most loaded experts (EPLB's redundant experts), where they relieve the fullest rank.

As in EPLB, in steps that are each greedy: experts go to nodes, if their copies are to stay on one; there the expert
with the heaviest copies gets one more until all places are taken; and the copies go to the ranks of the node, the
heaviest first to the lightest rank that has room. Other than there a rank never holds two copies of one expert, which
would only cost it memory; what is packed is evened out by exchanges; and there are fewer copies where more would make
the fullest rank fuller.
Source: https://github.com/deepseek-ai/EPLB; DeepSeek-V3, arXiv:2412.19437, section 3.4.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from turnout.balance.cost import Prices, cost_of
from turnout.balance.eplb import nodes_of
from turnout.balance.evening import evened
from turnout.balance.routed import Routed
from turnout.balance.search import Limits, balanced
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Mesh


def copied(
    loads_E: Sequence[float], mesh: Mesh, *, copies: int, groups: int = 1, present: Placement | None = None
) -> Placement:
    """Every expert once and so many copies; ranks hold equally many, the first ones one more where they do not divide.

    `groups`: equal runs of neighbouring experts that stay on one node where nodes divide them and the copies. The ranks
    of a node take the packs that have most in common with what they hold in `present`.
    Raises: ConfigError if a rank would hold none, the copies have no room, or groups do not divide the experts.
    """
    packs: list[list[int]] = []
    for experts, number, ranks in nodes_of(loads_E, mesh, groups=groups, redundant=copies):
        most = len(experts) * (ranks - 1)
        if number > most:
            raise ConfigError(
                f"{number} copies of {len(experts)} experts, each at most once on each of {ranks} ranks; nearest "
                f"legal: {most}"
            )
        loads = [loads_E[expert] for expert in experts]
        shares = _shares(loads, number, ranks)
        own = [sorted(experts[at] for at in pack) for pack in evened(_packed(shares, ranks), loads)]
        if present is not None:
            own = _at_home(own, [present.experts_of(rank) for rank in range(len(packs), len(packs) + ranks)])
        packs += own
    return Placement.holding(packs)


def best_copied(
    routed: Routed,
    prices: Prices,
    present: Placement | None = None,
    *,
    copies: int,
    groups: int = 1,
    allowed: Callable[[Placement], bool] = lambda _: True,
) -> Placement:
    """The placement of least predicted cost with so many copies or fewer: never worse than `present`, nor than
    `balanced` without any; of those that are `allowed`.

    Raises: ConfigError as `copied` and `balanced` do, or if no placement is allowed.
    """
    # the first of equals: where experts lie
    found = [] if present is None else [present]
    plain = None if present is not None and present.has_copies else present
    found.append(balanced(routed, prices, plain, Limits(room=-(-routed.num_experts // routed.mesh.size))))
    found += _tried(routed, present, copies, groups)
    legal = [each for each in found if allowed(each)]
    if not legal:
        raise ConfigError("no placement of these experts is allowed; allow the present one")
    return min(legal, key=lambda each: cost_of(each, routed, prices, present=present).objective(prices))


def _tried(routed: Routed, present: Placement | None, copies: int, groups: int) -> Iterator[Placement]:
    """Copies wherever they fit, and copies that stay on a node; as many as may be, or half as many, ..."""
    ranks, loads_E = routed.mesh.size, list(routed.loads_E)
    while copies > 0:
        for stays in dict.fromkeys((1, groups, routed.num_experts)):
            if stays == 1 or _have_room(routed, copies, stays):
                yield copied(loads_E, routed.mesh, copies=copies, groups=stays, present=present)
        copies = copies // 2 // ranks * ranks


def _have_room(routed: Routed, copies: int, groups: int) -> bool:
    """Whether so many copies fit where those of an expert stay on a node."""
    nodes = list(nodes_of(list(routed.loads_E), routed.mesh, groups=groups, redundant=copies))
    return all(number <= len(experts) * (ranks - 1) for experts, number, ranks in nodes)


def _shares(loads: Sequence[float], copies: int, ranks: int) -> list[tuple[float, int]]:
    """(load of a copy, expert) of every copy: one of each, then one more of whichever has the heaviest copies.

    None gets more copies than there are ranks.
    """
    number = [1] * len(loads)
    for _ in range(copies):
        open_ = [at for at in range(len(loads)) if number[at] < ranks]
        number[max(open_, key=lambda at: loads[at] / number[at])] += 1
    return [(loads[at] / number[at], at) for at in range(len(loads)) for _ in range(number[at])]


def _packed(shares: Sequence[tuple[float, int]], ranks: int) -> list[list[int]]:
    """The copies in packs of equal size, the heaviest first to the lightest rank that has room and no copy of it."""
    each, longer = divmod(len(shares), ranks)
    room = [each + (rank < longer) for rank in range(ranks)]
    found: list[list[int]] = [[] for _ in range(ranks)]
    weight = [0.0] * ranks
    for load, expert in sorted(shares, key=lambda share: (-share[0], share[1])):
        open_ = [rank for rank in range(ranks) if len(found[rank]) < room[rank]]
        fits = [rank for rank in open_ if expert not in found[rank]]
        if fits:
            rank = min(fits, key=lambda rank: weight[rank])
        else:
            rank = _made_room(found, weight, open_[0], expert, {at: share for share, at in shares})
        found[rank].append(expert)
        weight[rank] += load
    return found


def _made_room(
    found: list[list[int]], weight: list[float], open_rank: int, expert: int, share_of: Mapping[int, float]
) -> int:
    """The rank of a copy for which there is room only beside another: one without it gives something to that rank.

    There is one: a full rank without the copy has more than the open one has besides it.
    """
    ways = [
        (max(weight[rank] - share_of[other] + share_of[expert], weight[open_rank] + share_of[other]), rank, other)
        for rank, held in enumerate(found)
        if expert not in held
        for other in held
        if other not in found[open_rank]
    ]
    _, rank, other = min(ways)
    found[rank].remove(other)
    found[open_rank].append(other)
    weight[rank] -= share_of[other]
    weight[open_rank] += share_of[other]
    return rank


def _at_home(packs: Sequence[Sequence[int]], held: Sequence[Sequence[int]]) -> list[list[int]]:
    """The packs in the order of the ranks that hold most of each already."""
    common = {
        (at, rank): len(set(pack) & set(held[rank])) for at, pack in enumerate(packs) for rank in range(len(held))
    }
    given: dict[int, int] = {}
    for at, rank in sorted(common, key=lambda pair: (-common[pair], pair)):
        # as many places as the rank had, or the first ranks would no longer hold one more
        if at not in given.values() and rank not in given and len(packs[at]) == len(packs[rank]):
            given[rank] = at
    return [list(packs[given[rank]]) for rank in range(len(packs))]
