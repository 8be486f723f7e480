"""Copies of experts: where they stand, which rows they get, and what they bring and cost."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.balance import Deal, Prices, Routed, balanced, best_copied, copied, cost_of, dealt, eplb, turns
from turnout.balance.errands import expert_moves, home_of, twin_bytes, twins
from turnout.balance.evening import evened
from turnout.balance.search import Limits
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.plan.memory import memory_by_stage
from turnout.plan.query import Query
from turnout.plan.serving import Serving
from turnout.plan.step import step_of
from turnout.strategy import Strategy
from turnout.topology import Link, Mesh

FAST = Link(bytes_per_s=1e9)
COMPUTING = Prices(row_s=1.0, row_bytes=0.0, expert_bytes=0.0, intra=FAST, inter=FAST)
MESHES = (Mesh(nodes=1, local=4), Mesh(nodes=2, local=2), Mesh(nodes=2, local=4), Mesh(nodes=4, local=1))
LOADS = st.lists(st.integers(0, 1000), min_size=8, max_size=24)


def fullest(packs: list[list[int]] | Placement, loads: list[float]) -> float:
    """Most load of a rank, of experts whose copies share theirs evenly."""
    if isinstance(packs, Placement):
        packs = [list(packs.experts_of(rank)) for rank in range(packs.ranks)]
    number = Counter(itertools.chain(*packs))
    return max(sum(loads[expert] / number[expert] for expert in pack) for pack in packs)


# --- where they stand ---


@given(loads=LOADS, mesh=st.sampled_from(MESHES), copies=st.integers(0, 12), stays=st.booleans())
def test_every_expert_stands_somewhere_and_never_twice_on_a_rank(
    loads: list[float], mesh: Mesh, copies: int, stays: bool
) -> None:
    groups = len(loads) if stays and mesh.local > 1 else 1
    placement = copied(loads, mesh, copies=copies, groups=groups)
    held = [placement.experts_of(rank) for rank in range(mesh.size)]
    assert set(itertools.chain(*held)) == set(range(len(loads)))
    assert placement.num_slots == len(loads) + copies
    assert all(len(set(experts)) == len(experts) for experts in held)
    if groups > 1 and len(loads) % mesh.nodes == copies % mesh.nodes == 0:
        nodes = [{rank // mesh.local for rank in ranks} for ranks in placement.ranks_of]
        assert all(len(each) == 1 for each in nodes), "the copies of an expert stay on its node"
    else:
        assert max(map(len, held)) - min(map(len, held)) <= 1
    assert placement == copied(loads, mesh, copies=copies, groups=groups), "the same again"


@given(loads=LOADS, mesh=st.sampled_from(MESHES), times=st.integers(1, 3))
def test_the_fullest_rank_is_no_fuller_than_without_copies(loads: list[float], mesh: Mesh, times: int) -> None:
    routed = Routed.alike(loads, mesh)
    found = best_copied(routed, COMPUTING, copies=times * mesh.size)
    without = balanced(routed, COMPUTING, limits=Limits(room=-(-len(loads) // mesh.size)))
    assert cost_of(found, routed, COMPUTING).step_s <= cost_of(without, routed, COMPUTING).step_s * (1 + 1e-9)
    assert found.num_slots <= len(loads) + times * mesh.size


def test_small_cases_are_near_the_best_of_all_placements() -> None:
    """Half as much again at worst, and on average a tenth: bounds that are measured, not proven."""
    ratios = []
    for seed, (experts, ranks, copies) in itertools.product(range(8), ((4, 2, 2), (5, 2, 1), (4, 3, 2), (5, 3, 1))):
        loads = list(np.random.default_rng(seed).pareto(1.0, experts) + 0.1)
        got = fullest(copied(loads, Mesh(nodes=1, local=ranks), copies=copies), loads)
        ratios.append(got / min(fullest(packs, loads) for packs in every_packing(experts, ranks, copies)))
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) <= 1.5
    assert np.mean(ratios) <= 1.1


def every_packing(experts: int, ranks: int, copies: int) -> list[list[list[int]]]:
    each, longer = divmod(experts + copies, ranks)
    of_rank = [list(itertools.combinations(range(experts), each + (rank < longer))) for rank in range(ranks)]
    every = (list(map(list, packs)) for packs in itertools.product(*of_rank))
    return [packs for packs in every if len(set(itertools.chain(*packs))) == experts]


@pytest.mark.parametrize("seed", range(4))
def test_they_even_loads_out_better_than_eplb_does(seed: int) -> None:
    g, mesh = np.random.default_rng(seed), Mesh(nodes=1, local=16)
    loads = list(g.pareto(1.2, 64) + 0.1)
    own, theirs = fullest(copied(loads, mesh, copies=32), loads), fullest(eplb(loads, mesh, redundant=32), loads)
    assert own <= theirs * (1 + 1e-9)
    assert own <= 0.75 * fullest(eplb(loads, mesh), loads)


def test_evening_takes_from_the_fullest_rank_and_never_adds_to_it() -> None:
    # 6 + 5 against 1 + 2: one exchange makes it 6 + 1 against 5 + 2
    assert sorted(map(sorted, evened([[0, 1], [2, 3]], [6.0, 5, 1, 2]))) == [[0, 2], [1, 3]]
    # the place of a copy that relieves nobody goes to the expert that is heavy
    packs = evened([[0], [1, 2], [2, 3]], [90.0, 1, 1, 1])
    assert Counter(itertools.chain(*packs))[0] == 2


def test_ranks_keep_what_they_hold_where_they_can() -> None:
    mesh, loads = Mesh(nodes=1, local=4), [float(8 - expert) for expert in range(8)]
    first = copied(loads, mesh, copies=4)
    turned = Placement.holding([first.experts_of((rank + 1) % 4) for rank in range(4)])
    assert copied(loads, mesh, copies=4, present=turned) == turned


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: copied([1, 2], Mesh(nodes=1, local=2), copies=3), "3 copies of 2 experts, each at most once"),
        (lambda: copied([1, 2], Mesh(nodes=1, local=2), copies=-1), "redundant=-1"),
        (lambda: copied([1] * 4, Mesh(nodes=2, local=1), copies=2, groups=4), "on each of 1 ranks; nearest legal: 0"),
        (lambda: Placement((0, 2, 4), (0, 0, 1, 2)), "rank 0 holds expert 0 more than once; copies lie on different"),
        (lambda: Placement((0, 2, 4), (0, 1, 1, 3)), "each of the experts 0, 1, ... once, or more often"),
        (lambda: Strategy(expert_copies=2), "strategy.expert_copies=2 with ep=1: every rank has all experts"),
        (lambda: Strategy(ep=2, expert_copies=-1), "strategy.expert_copies=-1 must be at least 0"),
        (lambda: Strategy(ep=2, expert_copies=9).check(2, num_experts=8), "must not exceed 8: each of 8 experts"),
        (lambda: replace(COMPUTING, gradient_bytes=-1.0), "prices.gradient_bytes=-1.0 must be at least 0"),
        (
            lambda: best_copied(Routed.alike([1] * 4, MESHES[0]), COMPUTING, copies=4, allowed=lambda _: False),
            "no placement of these experts is allowed",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=re.escape(text)):
        make()


# --- what a placement with copies says ---


def test_a_placement_knows_the_copies_of_an_expert() -> None:
    placement = Placement.holding([[0, 1, 2], [3, 1], [2, 3]])
    assert (placement.num_experts, placement.num_slots, placement.has_copies) == (4, 7, True)
    assert placement.ranks_of == ((0,), (0, 1), (0, 2), (1, 2))
    assert placement.rank_of == (0, 0, 0, 1)
    assert placement.rank_at == (0, 0, 0, 1, 1, 2, 2)
    assert placement.copied == (1, 2, 3)
    # what several ranks hold is a run of its own, or one piece would lie in part of another
    assert [(run.expert, run.row, run.length) for run in placement.runs_of(0)] == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
    assert [(run.expert, run.rank) for run in placement.runs] == [(0, 0), (1, 0), (2, 0), (3, 1)]
    assert placement.experts_near((0, 1)) == (0, 1, 2, 3)


# --- which rows they get ---


@given(loads=LOADS, mesh=st.sampled_from(MESHES), copies=st.integers(0, 12), rows=st.integers(0, 50))
def test_every_row_of_a_rank_goes_to_one_copy(loads: list[float], mesh: Mesh, copies: int, rows: int) -> None:
    placement = copied(loads, mesh, copies=copies)
    for rank in range(mesh.size):
        named: dict[int, list[int]] = {expert: [] for expert in range(len(loads))}
        for slot, expert, row in pieces(dealt(placement, rank, mesh.local), lambda _: rows):
            assert placement.expert_at[slot] == expert
            assert rank not in placement.ranks_of[expert] or placement.rank_at[slot] == rank, "what is here stays"
            named[expert].append(row)
        assert all(sorted(found) == list(range(rows)) for found in named.values()), "each row once"


def pieces(deal: Deal, rows: Callable[[int], int]) -> Iterator[tuple[int, int, int]]:
    """(slot, expert, row) of every row that is dealt."""
    for slot, expert, first, stride in zip(deal.slot, deal.expert, deal.first, deal.stride, strict=True):
        yield from ((slot, expert, row) for row in range(first, rows(expert), stride))


@given(mesh=st.sampled_from(MESHES), seed=st.integers(0, 10**6))
def test_copies_get_the_same_where_ranks_have_the_same(mesh: Mesh, seed: int) -> None:
    g = np.random.default_rng(seed)
    number = int(g.integers(1, mesh.size + 1))
    holders = tuple(sorted(int(rank) for rank in g.choice(mesh.size, number, replace=False)))
    sent = [Counter(turn * (number // len(turn))) for turn in turns(holders, mesh.size, mesh.local)]
    assert all(each.total() == number for each in sent)
    assert sum(sent, Counter()) == dict.fromkeys(holders, mesh.size)
    # rows leave a node only for what its copies have no room for, and come to it only for what they have left
    near = Counter(rank // mesh.local for rank in holders)
    stayed = Counter(
        {
            node: sum(
                parts
                for rank in range(node * mesh.local, (node + 1) * mesh.local)
                for to, parts in sent[rank].items()
                if to // mesh.local == node
            )
            for node in range(mesh.nodes)
        }
    )
    for node in range(mesh.nodes):
        assert stayed[node] == min(mesh.local * number, near[node] * mesh.size)


def test_single_rows_of_several_ranks_go_to_different_copies() -> None:
    placement = Placement.holding([[0], [1, 0], [2], [3]])
    slots = [
        slot for rank in (2, 3) for slot, expert, _ in pieces(dealt(placement, rank, 4), lambda _: 1) if not expert
    ]
    assert sorted(slots) == [0, 2]


@given(seed=st.integers(0, 10**6), mesh=st.sampled_from(MESHES), copies=st.integers(1, 8))
def test_what_is_predicted_of_rows_is_what_is_dealt(seed: int, mesh: Mesh, copies: int) -> None:
    g = np.random.default_rng(seed)
    # so many that all divide
    routed = Routed(rows_RE=g.integers(0, 3, (mesh.size, 8)) * 840.0, mesh=mesh)
    placement = copied(list(routed.loads_E), mesh, copies=copies)
    sent_RR = np.zeros((mesh.size, mesh.size))
    for rank in range(mesh.size):
        own = routed.rows_RE[rank].astype(int)
        for slot, _, _ in pieces(dealt(placement, rank, mesh.local), own.__getitem__):
            sent_RR[rank, placement.rank_at[slot]] += 1
    held = [placement.experts_of(rank) for rank in range(mesh.size)]
    assert np.allclose(routed.sent_RR(held), sent_RR)


# --- what they cost ---


def test_a_copy_is_made_from_the_nearest_rank_that_has_the_expert() -> None:
    before = Placement.holding([[0, 3], [1], [2, 0], [1]])
    after = Placement.holding([[0, 3], [1, 0], [2], [1, 0, 2]])
    assert list(expert_moves(before, after)) == [(0, 0, 1), (0, 2, 3), (2, 2, 3)]
    assert list(expert_moves(after, after)) == []


def test_gradients_of_copies_travel_to_one_of_their_ranks_and_back() -> None:
    placement = Placement.holding([[0, 1], [1, 2], [1, 2]])
    assert (home_of(placement, 1), home_of(placement, 2)) == (1, 1)
    assert list(twins(placement)) == [(0, 1), (1, 0), (2, 1), (1, 2), (2, 1), (1, 2)]
    assert twin_bytes(placement, [10, 0]) == {(0, 2): 10, (2, 0): 10, (4, 2): 20, (2, 4): 20}
    assert twin_bytes(Placement.even(4, 2), [10]) == {}


def test_gradients_that_are_dear_are_not_paid_for() -> None:
    mesh = Mesh(nodes=1, local=4)
    routed = Routed.alike([100.0, 1, 1, 1, 1, 1, 1, 1], mesh)
    cheap = replace(COMPUTING, gradient_bytes=1e9)
    found = best_copied(routed, cheap, copies=4)
    assert len(found.ranks_of[0]) > 1
    # a second to compute a row; now each copy takes a thousand
    assert not best_copied(routed, replace(cheap, gradient_bytes=1e12), copies=4).has_copies
    cost = cost_of(found, routed, cheap)
    # its home gets one gradient from each of the others
    homes = Counter(home_of(found, expert) for expert in found.copied for _ in found.ranks_of[expert][1:])
    assert cost.copies_s >= max(homes.values()) - 1e-9
    assert cost.step_s == pytest.approx(cost.compute_s + cost.exchange_s + cost.copies_s)


# --- the planner ---


def test_memory_counts_copies_and_what_knows_no_loads_refuses_them() -> None:
    def query(copies: int) -> Query:
        strategy = Strategy(tp=8, ep=8, expert_copies=copies, folded=True, shard_tokens=True)
        return Query(model="mixtral-8x7b", nodes=1, global_batch=64, strategy=strategy)

    without, with_ = (memory_by_stage(query(copies).job())[0] for copies in (0, 8))
    shape, framework = query(0).shape, query(0).job().framework
    # each rank holds one expert of eight, and a copy of one
    assert with_.weights_bytes - without.weights_bytes == pytest.approx(
        shape.num_layers * shape.expert_params * framework.weight_bytes
    )
    assert with_.optimizer_bytes > without.optimizer_bytes
    with pytest.raises(ConfigError, match="expert_copies=8: memory knows copies, seconds and bytes"):
        step_of(query(8).job(), 8)
    with pytest.raises(ConfigError, match=r"not planned for inference; nearest legal: 0 \(redundant_experts is\)"):
        Serving(model="mixtral-8x7b", nodes=1, strategy=query(8).strategy)
