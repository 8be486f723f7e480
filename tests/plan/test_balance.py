"""Placements from measured routing: EPLB as published, and a search that never does worse than where it starts."""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.balance import Limits, Prices, Routed, balanced, cost_of, eplb, expert_moves, moved_bytes, pays
from turnout.balance.moving import by_rank
from turnout.balance.search import _Search  # pyright: ignore[reportPrivateUsage]
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Link, Mesh

SLOW, FAST = Link(bytes_per_s=1e8), Link(bytes_per_s=1e9)
PRICES = Prices(row_s=1e-6, row_bytes=256, expert_bytes=1e5, intra=FAST, inter=SLOW, period=50)
TWO_HOSTS = Mesh(nodes=2, local=2)


def drawn(seed: int, mesh: Mesh, experts: int) -> Routed:
    """Loads with a long tail, and hosts that like experts of their own."""
    g = np.random.default_rng(seed)
    popular = g.zipf(1.6, experts).clip(max=50) * 10.0
    taste = g.gamma(0.5, 1.0, (mesh.nodes, experts)).repeat(mesh.local, axis=0)
    return Routed(rows_RE=np.floor(popular * taste * g.uniform(0.8, 1.2, taste.shape)), mesh=mesh)


def every_placement(mesh: Mesh, experts: int, room: int) -> list[Placement]:
    found = []
    for rank_of in itertools.product(range(mesh.size), repeat=experts):
        counts = Counter(rank_of)
        if len(counts) == mesh.size and max(counts.values()) <= room:
            found.append(Placement.of(rank_of, mesh.size))
    return found


# --- EPLB ---


def test_the_heaviest_goes_to_the_lightest_that_has_room() -> None:
    # 90 to one; 45, 40 and 35 to the other, which is full then
    assert eplb([90, 45, 40, 35, 30, 10], Mesh(nodes=1, local=2)) == [[0, 4, 5], [1, 2, 3]]


def test_groups_stay_on_a_node() -> None:
    loads = [9, 8, 1, 1, 7, 1, 2, 1]
    packs = eplb(loads, TWO_HOSTS, groups=4)
    assert packs == [[0, 3], [1, 2], [4, 7], [5, 6]], "groups of 17 and 2 on one node, of 8 and 3 on the other"


def test_copies_go_to_the_heaviest_copy() -> None:
    # 12 is halved, then 5 and the halves of 12: 6, so it is cut in three
    packs = eplb([12, 5, 1, 1], Mesh(nodes=1, local=3), redundant=2)
    assert Counter(expert for pack in packs for expert in pack) == {0: 3, 1: 1, 2: 1, 3: 1}
    assert all(len(pack) == 2 for pack in packs)


@given(
    loads=st.lists(st.integers(0, 1000), min_size=4, max_size=24),
    nodes=st.sampled_from([1, 2]),
    redundant=st.sampled_from([0, 2, 4]),
)
def test_eplb_places_every_expert_evenly(loads: list[int], nodes: int, redundant: int) -> None:
    packs = eplb(loads, Mesh(nodes=nodes, local=4 // nodes), redundant=redundant)
    assert set(itertools.chain(*packs)) == set(range(len(loads)))
    assert sum(map(len, packs)) == len(loads) + redundant
    assert max(map(len, packs)) - min(map(len, packs)) <= 1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: eplb([1, 2, 3], Mesh(nodes=1, local=2), groups=2), "groups=2 must divide num_experts=3"),
        (lambda: eplb([1, 2], Mesh(nodes=1, local=4), redundant=1), "nearest legal: 2"),
        (lambda: eplb([1, 2], Mesh(nodes=1, local=2), redundant=-1), "redundant=-1"),
        (lambda: replace(PRICES, row_s=-1.0), "prices.row_s=-1.0 must be at least 0"),
        (lambda: replace(PRICES, period=0), "prices.period=0 must be at least 1"),
        (lambda: Limits(room=-1), "balance.room=-1 must be at least 0"),
        (
            lambda: balanced(drawn(0, TWO_HOSTS, 8), PRICES, limits=Limits(room=1)),
            "holds 4 of 8 experts; nearest legal: 2",
        ),
        (lambda: balanced(drawn(0, TWO_HOSTS, 8), PRICES, Placement.even(8, 2)), "8 experts on 2 ranks; 8 on 4"),
        (lambda: Routed(rows_RE=np.zeros((4, 3)), mesh=TWO_HOSTS), "need a row of counts of at least 4"),
        (lambda: Routed(rows_RE=-np.ones((4, 4)), mesh=TWO_HOSTS), "none of them negative"),
        (lambda: cost_of([[0], [1], [2], [2]], drawn(0, TWO_HOSTS, 4), PRICES), "expert 3 lies on no rank"),
        (lambda: list(expert_moves(Placement.even(4, 2), Placement.even(4, 4))), "a move keeps experts and ranks"),
    ],
)
def test_what_cannot_be_is_refused(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=re.escape(text)):
        make()


# --- cost ---


def test_the_cost_of_a_placement_counted_by_hand() -> None:
    rows_RE = np.array([[5.0, 0, 2, 1], [1, 1, 1, 1], [0, 4, 0, 0], [2, 0, 0, 3]])
    routed, prices = Routed(rows_RE=rows_RE, mesh=TWO_HOSTS), replace(PRICES, row_s=1.0, row_bytes=10)
    cost = cost_of(Placement.of((2, 0, 1, 3), 4), routed, prices)
    # ranks get 5, 3, 8 and 5 rows; 0 and 1 send 6 and 2 of them away, 2 and 3 send 4 and 0
    assert cost.compute_s == 8
    assert cost.max_load == pytest.approx(8 / 5.25)
    assert cost.inter_bytes == 4 * 10 * (6 + 2 + 4 + 0)
    # inside: 0 sends 2 to 1, 1 sends 1 to 0, 3 sends 2 to 2
    assert cost.intra_bytes == 4 * 10 * (2 + 1 + 2)
    assert cost.exchange_s == pytest.approx(4 * 10 * max(6 / 1e8, 2 / 1e9))
    assert cost.move_s == 0
    # one card: the first host sends 8 in all and gets 4, which is 4 for each of its ranks
    shared = cost_of(Placement.of((2, 0, 1, 3), 4), routed, replace(prices, shares_card=True))
    assert shared.exchange_s == pytest.approx(4 * 10 * max(8 / 2 / 1e8, 2 / 1e9))
    assert shared.inter_bytes == cost.inter_bytes


def test_a_move_is_as_slow_as_its_busiest_rank() -> None:
    routed = drawn(1, TWO_HOSTS, 8)
    before, after = Placement.even(8, 4), Placement.of((0, 2, 1, 2, 0, 1, 3, 3), 4)
    # rank 1 sends its two to rank 2, and rank 0 one to rank 2: three cross to it, or two from it
    cost = cost_of(after, routed, PRICES, present=before)
    moves = [(old // 2 != new // 2, old, new) for _, old, new in expert_moves(before, after)]
    far_in = max(Counter(new for far, _, new in moves if far).values())
    far_out = max(Counter(old for far, old, _ in moves if far).values())
    assert cost.move_s == pytest.approx(max(far_in, far_out) * 1e5 / 1e8)
    assert cost.objective(PRICES) == pytest.approx(cost.step_s + cost.move_s / 50)
    assert cost_of(before, routed, PRICES, present=before).move_s == 0


def test_copies_get_the_same_and_as_few_rows_leave_a_host_as_may_be() -> None:
    rows_RE = np.zeros((4, 4))
    rows_RE[:, 0] = 12
    routed = Routed(rows_RE=rows_RE, mesh=TWO_HOSTS)
    # three copies take 16 each: what is there stays, and of the other's 12 the near copy has room for 4
    sent_RR = routed.sent_RR([[0], [1, 2, 3], [0], [0]])
    assert sent_RR.sum(axis=0).tolist() == [16, 0, 16, 16]
    assert sent_RR[1].tolist() == [4, 0, 4, 4]
    cost = cost_of([[0], [1, 2, 3], [0], [0]], routed, PRICES)
    assert cost.inter_bytes == pytest.approx(4 * 256 * 8)
    assert routed.sent_RR([[0], [0], [1, 2], [3]])[2].tolist() == [6, 6, 0, 0], "from a host without any to all"
    # two copies on one rank, as EPLB may place them, are as one of twice the size
    assert routed.sent_RR([[0, 0], [0, 1], [2], [3]]).sum(axis=0).tolist() == [32, 16, 0, 0]


@given(seed=st.integers(0, 10**6), experts=st.integers(4, 12), shares_card=st.booleans())
def test_the_search_adds_up_what_the_cost_says(seed: int, experts: int, shares_card: bool) -> None:
    """Two ways to one number: sums over ranks that exchanges change, and a matrix of rows from rank to rank."""
    routed, g = drawn(seed, TWO_HOSTS, experts), np.random.default_rng(seed)
    rank_of = [0, 1, 2, 3, *g.integers(0, 4, experts - 4)]
    present, where = Placement.even(experts, 4), Placement.of(rank_of, 4)
    prices = replace(PRICES, shares_card=shares_card)
    search = _Search(routed, prices, present, Limits())
    value, _ = search.value(search.sums(np.array(rank_of)))
    assert float(value) == pytest.approx(cost_of(where, routed, prices, present=present).objective(prices), rel=1e-12)


# --- the search ---


def test_the_price_of_a_move_is_of_every_expert_and_slice_that_moves() -> None:
    before, after = Placement.of((0, 0, 1, 1), 2), Placement.of((1, 1, 0, 0), 2)
    assert moved_bytes(before, after, (10, 6)) == {(0, 2): 20, (1, 3): 12, (2, 0): 20, (3, 1): 12}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("mesh", "experts", "room"), [(TWO_HOSTS, 6, 2), (TWO_HOSTS, 6, 3), (Mesh(nodes=2, local=1), 9, 5)]
)
def test_small_cases_cost_hardly_more_than_the_best_of_all_placements(
    seed: int, mesh: Mesh, experts: int, room: int
) -> None:
    routed, present = drawn(seed, mesh, experts), Placement.even(experts, mesh.size)
    found = balanced(routed, PRICES, present, Limits(room=room))
    got = cost_of(found, routed, PRICES, present=present).objective(PRICES)
    every = every_placement(mesh, experts, room)
    want = min(cost_of(each, routed, PRICES, present=present).objective(PRICES) for each in every)
    assert want * (1 - 1e-9) <= got <= want * 1.02


@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(4, 20),
    spare=st.integers(0, 2),
    has_present=st.booleans(),
    shares_card=st.booleans(),
    mesh=st.sampled_from([TWO_HOSTS, Mesh(nodes=1, local=4), Mesh(nodes=4, local=1), Mesh(nodes=2, local=1)]),
)
def test_it_is_never_worse_than_where_it_starts(
    seed: int, experts: int, spare: int, has_present: bool, shares_card: bool, mesh: Mesh
) -> None:
    prices = replace(PRICES, shares_card=shares_card)
    routed, g = drawn(seed, mesh, experts), np.random.default_rng(seed)
    even = Placement.even(experts, mesh.size)
    present = Placement(even.bounds, tuple(int(e) for e in g.permutation(experts))) if has_present else None
    room = -(-experts // mesh.size) + spare
    found = balanced(routed, prices, present, Limits(room=room))
    assert sorted(found.expert_at) == list(range(experts))
    assert all(1 <= len(found.experts_of(rank)) <= room for rank in range(mesh.size))
    packs = eplb(list(routed.loads_E), mesh)
    by_eplb = Placement.of([next(r for r, pack in enumerate(packs) if e in pack) for e in range(experts)], mesh.size)
    own = cost_of(found, routed, prices, present=present).objective(prices)
    for start in (even, by_eplb, *([present] if present else [])):
        assert own <= cost_of(start, routed, prices, present=present).objective(prices) * (1 + 1e-9)
    assert found == balanced(routed, prices, present, Limits(room=room)), "the same again"


def test_experts_go_to_the_host_that_wants_them_and_loads_are_even() -> None:
    wanted = np.array([1, 0, 0, 1, 1, 0, 1, 0])
    rows_RE = np.stack([np.where(wanted == rank // 2, 100.0, 1.0) for rank in range(4)])
    routed = Routed(rows_RE=rows_RE, mesh=TWO_HOSTS)
    found = balanced(routed, PRICES, Placement.even(8, 4))
    assert [rank // 2 for rank in found.rank_of] == list(wanted)
    assert cost_of(found, routed, PRICES).max_load == 1


def test_what_does_not_pay_for_its_move_stays() -> None:
    routed, present = drawn(3, TWO_HOSTS, 8), Placement.even(8, 4)
    dear = replace(PRICES, expert_bytes=1e12)
    assert balanced(routed, dear, present) == present
    assert balanced(routed, replace(dear, period=10**9), present) != present


def test_what_saves_less_than_a_prediction_is_good_for_is_not_made() -> None:
    routed, present = drawn(3, TWO_HOSTS, 8), Placement.even(8, 4)
    now = cost_of(present, routed, PRICES)
    for share, is_made in ((0.985, True), (0.995, False), (1.005, False)):
        assert pays(now, replace(now, step_s=share * now.step_s), PRICES) is is_made
    # 2 % of every step, less the move's
    saving = replace(now, step_s=0.98 * now.step_s, move_s=0.02 * now.step_s)
    assert pays(now, saving, replace(PRICES, period=10))
    assert not pays(now, saving, replace(PRICES, period=1))


def test_many_experts_are_searched_in_part_and_no_worse() -> None:
    mesh = Mesh(nodes=4, local=4)
    routed = drawn(5, mesh, 128)
    found = balanced(routed, PRICES, limits=Limits(rounds=5))
    packs = eplb(list(routed.loads_E), mesh)
    assert cost_of(found, routed, PRICES).step_s < 0.9 * cost_of(packs, routed, PRICES).step_s
    assert max(len(found.experts_of(rank)) for rank in range(16)) == 8


# --- what a move sends ---


def test_the_bytes_of_a_move_by_rank_and_slice() -> None:
    before, after = Placement.even(4, 2), Placement.of((0, 1, 0, 1), 2)
    assert list(expert_moves(before, after)) == [(1, 0, 1), (2, 1, 0)]
    assert moved_bytes(before, after, [100]) == {(0, 1): 100, (1, 0): 100}
    pairs = moved_bytes(before, after, [100, 7])
    assert pairs == {(0, 2): 100, (1, 3): 7, (2, 0): 100, (3, 1): 7}
    inside, between = by_rank(pairs, Mesh(nodes=1, local=4)), by_rank(pairs, Mesh(nodes=2, local=2))
    assert [each.intra_bytes for each in inside] == [each.inter_bytes for each in between] == [100, 7, 100, 7]
    assert moved_bytes(before, before, [100]) == {}
