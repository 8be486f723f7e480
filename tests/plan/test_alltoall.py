"""All-to-all programs: each delivers what flat delivers, is undone by its way back, and moves the bytes it counts."""

import random
from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.alltoall import (
    PROGRAMS,
    LoadedRouting,
    LoopbackTransport,
    RoutedTokens,
    Rows,
    RowSize,
    UniformRouting,
    combine,
    dispatch,
    expected_distinct,
    load,
    pairs_of,
    round_trip,
    steps_of,
    token_sums,
    traffic_of,
)
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Mesh

SIZE = RowSize(row_bytes=7.0, back_bytes=16.0, label_bytes=8.0)
Destinations = list[list[list[int]]]


@st.composite
def routings(draw: st.DrawFn) -> tuple[Mesh, int, Destinations]:
    """A mesh, a tensor-parallel degree, and where each rank's tokens go; some ranks have no token."""
    mesh = Mesh(nodes=draw(st.integers(1, 4)), local=draw(st.integers(1, 4)))
    tensor, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    choices = st.lists(st.integers(0, mesh.size - 1), min_size=top_k, max_size=top_k)
    tokens = st.lists(choices, max_size=5)
    return mesh, tensor, [draw(tokens) for _ in range(mesh.size)]


def payload(source: int, token: int) -> int:
    return 1000 * source + token + 1


def delivered(rows: Rows) -> list[list[tuple[int, int, int]]]:
    return [[(row.source, row.slots[0][0], row.payload) for row in held] for held in rows.ranks]


def expert(source: int, position: int, index: int) -> int:
    """What an expert multiplies an assignment's row by; tensor-parallel ranks have different parts of it."""
    return 3 + 5 * position + 7 * source + 11 * index


def worked(rows: Rows, tensor: int) -> Rows:
    held = []
    for rank, mine in enumerate(rows.ranks):
        factors = [expert(row.source, row.slots[0][0], rank % tensor) for row in mine]
        held.append(
            tuple(type(r)(r.source, r.token, r.slots, r.payload * f) for r, f in zip(mine, factors, strict=True))
        )
    return Rows(tuple(held))


@pytest.mark.parametrize("name", PROGRAMS.names())
@settings(max_examples=25, deadline=None)
@given(case=routings())
def test_every_program_delivers_the_rows_of_flat_in_the_same_order(
    name: str, case: tuple[Mesh, int, Destinations]
) -> None:
    mesh, tensor, destinations = case
    got, want = (
        dispatch(PROGRAMS[each], LoopbackTransport(mesh, SIZE, tensor), load(destinations, payload, tensor))
        for each in (name, "flat")
    )
    assert delivered(got) == delivered(want)


@pytest.mark.parametrize("name", PROGRAMS.names())
@settings(max_examples=25, deadline=None)
@given(case=routings())
def test_the_way_back_sums_what_experts_made_of_every_token(name: str, case: tuple[Mesh, int, Destinations]) -> None:
    mesh, tensor, destinations = case
    transport = LoopbackTransport(mesh, SIZE, tensor)
    start = load(destinations, payload, tensor)
    there = dispatch(PROGRAMS[name], transport, start)
    back = combine(PROGRAMS[name], transport, worked(there, tensor))
    got = token_sums(back, [len(tokens) for tokens in destinations])
    for place, tokens in enumerate(destinations):
        mine = got[place * tensor : (place + 1) * tensor]
        # coordinated sums the tensor-parallel parts itself; elsewhere the layer's all-reduce does
        sums = mine[0] if name == "coordinated" else [sum(parts) for parts in zip(*mine, strict=True)]
        want = [0] * len(tokens)
        for row in start.ranks[place * tensor]:
            want[row.token] += sum(row.payload * expert(place, row.slots[0][0], index) for index in range(tensor))
        assert sums == want
        if name == "coordinated":
            assert all(other == sums for other in mine)


@pytest.mark.parametrize("name", PROGRAMS.names())
@settings(max_examples=25, deadline=None)
@given(case=routings())
def test_counted_bytes_and_messages_of_every_pair_are_the_moved_ones(
    name: str, case: tuple[Mesh, int, Destinations]
) -> None:
    mesh, tensor, destinations = case
    transport = LoopbackTransport(mesh, SIZE, tensor)
    there = dispatch(PROGRAMS[name], transport, load(destinations, payload, tensor))
    combine(PROGRAMS[name], transport, there)
    routing = RoutedTokens(mesh, destinations)
    assert pairs_of(round_trip(PROGRAMS[name], mesh, tensor), routing, SIZE, tensor=tensor) == dict(transport.moved)


def brute_force(name: str, mesh: Mesh, destinations: Destinations) -> tuple[int, int]:
    """Rows that leave their node, and rows that change ranks inside one, one way, straight from the definition."""
    inter = intra = 0
    for source, tokens in enumerate(destinations):
        here, lane = divmod(source, mesh.local)
        for token in tokens:
            if name in ("flat", "coordinated", "rank_dedup"):
                ranks = set(token) if name == "rank_dedup" else token
                inter += sum(rank // mesh.local != here for rank in ranks)
                intra += sum(rank // mesh.local == here and rank != source for rank in ranks)
            elif name == "hierarchical":
                inter += sum(rank // mesh.local != here for rank in token)
                intra += sum(rank % mesh.local != lane for rank in token)
            else:
                inter += len({rank // mesh.local for rank in token} - {here})
                intra += sum(rank % mesh.local != lane for rank in set(token))
    return inter, intra


@pytest.mark.parametrize("name", PROGRAMS.names())
def test_two_hundred_random_layouts_agree_with_simulated_routing(name: str) -> None:
    draw = random.Random(0)
    for _ in range(200):
        mesh = Mesh(nodes=draw.randint(1, 5), local=draw.randint(1, 4))
        experts = mesh.size * draw.randint(1, 3)
        top_k = draw.randint(1, min(4, experts))
        destinations = [
            [[e * mesh.size // experts for e in draw.sample(range(experts), top_k)] for _ in range(draw.randint(0, 6))]
            for _ in range(mesh.size)
        ]
        got = traffic_of(
            round_trip(PROGRAMS[name], mesh), RoutedTokens(mesh, destinations), RowSize(row_bytes=3.0, back_bytes=2.0)
        )
        inter, intra = brute_force(name, mesh, destinations)
        assert got.inter_bytes * mesh.size == pytest.approx(5 * inter, abs=1e-9)
        assert got.intra_bytes * mesh.size == pytest.approx(5 * intra, abs=1e-9)
        remote = mesh.nodes - 1 if name in ("hierarchical", "node_dedup") else mesh.size - mesh.local
        assert (got.intra_messages, got.inter_messages) == (2 * (mesh.local - 1), 2 * remote)


@pytest.mark.parametrize("name", ["flat", "hierarchical", "coordinated"])
@pytest.mark.parametrize(("nodes", "local"), [(1, 4), (4, 1), (3, 8), (8, 3), (16, 8)])
def test_closed_forms_of_uniform_routing(name: str, nodes: int, local: int) -> None:
    mesh, n = Mesh(nodes=nodes, local=local), nodes * local
    routing = UniformRouting(mesh=mesh, num_tokens=n * 10, top_k=1, num_experts=n)
    sent = 2 * n * 10 * 4.0
    got = traffic_of(round_trip(PROGRAMS[name], mesh), routing, RowSize(row_bytes=4.0, back_bytes=4.0))
    assert got.inter_bytes == pytest.approx(sent * (n - local) / n, rel=1e-9)
    if name == "hierarchical":
        assert got.intra_bytes == pytest.approx(sent * (local - 1) / local, rel=1e-9)
        assert (got.intra_messages, got.inter_messages) == (2 * (local - 1), 2 * (nodes - 1))
    else:
        assert got.intra_bytes == pytest.approx(sent * (local - 1) / n, rel=1e-9)
        assert (got.intra_messages, got.inter_messages) == (2 * (local - 1), 2 * (n - local))


def test_coordinated_sends_one_share_between_nodes_and_gathers_inside() -> None:
    mesh, size, tensor = Mesh(nodes=16), RowSize(row_bytes=2.0, back_bytes=2.0), 8
    routing = UniformRouting(mesh=mesh, num_tokens=800, top_k=2, num_experts=16)
    flat = traffic_of(round_trip(PROGRAMS["flat"], mesh, tensor), routing, size, tensor=tensor)
    got = traffic_of(round_trip(PROGRAMS["coordinated"], mesh, tensor), routing, size, tensor=tensor)
    assert got.inter_bytes == pytest.approx(flat.inter_bytes / tensor)
    # rows at the experts gathered and reduced, then tokens gathered at the source
    assert got.intra_bytes == pytest.approx((tensor - 1) / tensor * 800 * 2.0 * (2 + 2 + 1))


@pytest.mark.parametrize(
    ("experts", "top_k", "nodes", "remote"),
    [
        (8, 2, 2, 0.79), (8, 2, 4, 1.39), (8, 2, 8, 1.75), (16, 2, 2, 0.77), (16, 2, 4, 1.35), (16, 2, 8, 1.69),
        (16, 2, 16, 1.88), (64, 8, 2, 1.0), (64, 8, 4, 2.7), (64, 8, 8, 4.7), (64, 8, 16, 6.3), (256, 8, 16, 6.1),
    ],
)  # fmt: skip
def test_expected_distinct_nodes_are_those_of_the_published_table(
    experts: int, top_k: int, nodes: int, remote: float
) -> None:
    got = expected_distinct(experts, nodes, top_k) * (nodes - 1) / nodes
    assert got == pytest.approx(remote, abs=0.06 if top_k == 8 else 0.0067)


@pytest.mark.parametrize(("experts", "top_k", "nodes"), [(8, 2, 4), (16, 4, 4), (64, 8, 8), (6, 5, 2)])
def test_expected_distinct_nodes_are_what_simulation_finds(experts: int, top_k: int, nodes: int) -> None:
    draw, trials = random.Random(1), 4000
    found = Counter(len({e * nodes // experts for e in draw.sample(range(experts), top_k)}) for _ in range(trials))
    mean = sum(number * times for number, times in found.items()) / trials
    deviation = (sum(times * (number - mean) ** 2 for number, times in found.items()) / trials) ** 0.5
    assert expected_distinct(experts, nodes, top_k) == pytest.approx(mean, abs=5 * deviation / trials**0.5 + 1e-12)


@pytest.mark.parametrize("name", PROGRAMS.names())
@pytest.mark.parametrize(
    ("nodes", "local", "experts", "top_k"),
    [(3, 2, 12, 3), (2, 2, 4, 2), (4, 1, 8, 4), (1, 3, 9, 2), (2, 2, 6, 3), (3, 2, 8, 2), (4, 1, 7, 3), (1, 4, 9, 2)],
)
def test_uniform_routing_expects_what_every_choice_of_experts_moves(
    name: str, nodes: int, local: int, experts: int, top_k: int
) -> None:
    """One token for every set of k experts at every rank is uniform routing to the last byte, uneven ranks too."""
    mesh = Mesh(nodes=nodes, local=local)
    bounds = Placement.even(experts, mesh.size).bounds
    ranks = [rank for rank, (start, end) in enumerate(pairwise(bounds)) for _ in range(start, end)]
    tokens = [[ranks[e] for e in chosen] for chosen in combinations(range(experts), top_k)]
    moves = round_trip(PROGRAMS[name], mesh)
    want = traffic_of(moves, RoutedTokens(mesh, [tokens] * mesh.size), SIZE)
    uniform = UniformRouting(mesh=mesh, num_tokens=len(tokens), top_k=top_k, num_experts=experts)
    assert vars(traffic_of(moves, uniform, SIZE)) == pytest.approx(vars(want), rel=1e-9)


@pytest.mark.parametrize("name", PROGRAMS.names())
def test_equal_loads_are_uniform_routing(name: str) -> None:
    mesh, moves = Mesh(nodes=3, local=2), round_trip(PROGRAMS[name], Mesh(nodes=3, local=2))
    loaded = LoadedRouting(mesh=mesh, num_tokens=90.0, top_k=3, loads=(5.0,) * 12)
    uniform = UniformRouting(mesh=mesh, num_tokens=90.0, top_k=3, num_experts=12)
    assert vars(traffic_of(moves, loaded, SIZE)) == pytest.approx(vars(traffic_of(moves, uniform, SIZE)), rel=1e-9)
    assert loaded.skew() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["flat", "hierarchical"])
def test_equal_loads_on_uneven_ranks_are_uniform_routing_too(name: str) -> None:
    mesh, moves = Mesh(nodes=3, local=2), round_trip(PROGRAMS[name], Mesh(nodes=3, local=2))
    loaded = LoadedRouting(mesh=mesh, num_tokens=90.0, top_k=3, loads=(5.0,) * 15)
    uniform = UniformRouting(mesh=mesh, num_tokens=90.0, top_k=3, num_experts=15)
    assert vars(traffic_of(moves, loaded, SIZE)) == pytest.approx(vars(traffic_of(moves, uniform, SIZE)), rel=1e-9)
    assert loaded.skew() == pytest.approx(3 / 2.5)


@pytest.mark.parametrize("name", PROGRAMS.names())
def test_loads_of_a_skewed_routing_give_its_traffic(name: str) -> None:
    """Bytes per assignment within sampling error; merged ones within what the estimate is off, 5% here."""
    mesh, draw, tokens, top_k = Mesh(nodes=3, local=2), random.Random(4), 300, 3
    weights = [1.0 / (1 + e) ** 0.5 for e in range(12)]
    loads, destinations = [0] * 12, [[] for _ in range(mesh.size)]
    for source in range(mesh.size):
        for _ in range(tokens):
            chosen = sorted(range(12), key=lambda e: draw.random() ** (1 / weights[e]), reverse=True)[:top_k]
            destinations[source].append([e // 2 for e in chosen])
            for e in chosen:
                loads[e] += 1
    moves = round_trip(PROGRAMS[name], mesh)
    want = traffic_of(moves, RoutedTokens(mesh, destinations), SIZE)
    loaded = LoadedRouting(mesh=mesh, num_tokens=tokens, top_k=top_k, loads=tuple(loads))
    got = traffic_of(moves, loaded, SIZE)
    assert got.inter_bytes == pytest.approx(want.inter_bytes, rel=0.05)
    assert got.intra_bytes == pytest.approx(want.intra_bytes, rel=0.05)
    assert loaded.skew() == pytest.approx(max(map(sum, zip(loads[::2], loads[1::2], strict=True))) * 6 / sum(loads))


@pytest.mark.parametrize(
    ("loads", "text"),
    [((1.0,) * 3, "loads has 3 experts"), ((0.0,) * 4, "not all 0"), ((-1.0, 1.0, 1.0, 1.0), "smallest is -1.0")],
)
def test_loads_that_mean_nothing_are_refused(loads: tuple[float, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LoadedRouting(mesh=Mesh(nodes=2, local=2), num_tokens=1.0, top_k=1, loads=loads)


@settings(max_examples=25, deadline=None)
@given(case=routings())
def test_merging_never_adds_bytes_between_nodes(case: tuple[Mesh, int, Destinations]) -> None:
    mesh, _, destinations = case
    routing, size = RoutedTokens(mesh, destinations), RowSize(row_bytes=1.0, back_bytes=1.0)
    sent = {name: traffic_of(round_trip(PROGRAMS[name], mesh), routing, size).inter_bytes for name in PROGRAMS.names()}
    assert sent["node_dedup"] <= sent["rank_dedup"] <= sent["flat"] == sent["hierarchical"]


@pytest.mark.parametrize("name", PROGRAMS.names())
@settings(max_examples=25, deadline=None)
@given(case=routings())
def test_what_goes_there_comes_back(name: str, case: tuple[Mesh, int, Destinations]) -> None:
    """Without labels and with rows of one size, a pair's bytes are those of the same pair turned round."""
    mesh, _, destinations = case
    routing, size = RoutedTokens(mesh, destinations), RowSize(row_bytes=4.0, back_bytes=4.0)
    pairs = pairs_of(round_trip(PROGRAMS[name], mesh), routing, size)
    assert all(pairs[there][0] == pairs[there[::-1]][0] for there in pairs)
    total = traffic_of(round_trip(PROGRAMS[name], mesh), routing, size).total_bytes * mesh.size
    assert total == pytest.approx(sum(sent for sent, _ in pairs.values()))


def test_node_limit_bounds_the_copies() -> None:
    mesh = Mesh(nodes=8, local=8)
    size = RowSize(row_bytes=1.0, back_bytes=0.0)
    inter = [
        traffic_of(
            round_trip(PROGRAMS["node_dedup"], mesh),
            UniformRouting(mesh=mesh, num_tokens=1, top_k=8, num_experts=256, node_limit=limit),
            size,
        ).inter_bytes
        for limit in (0, 4)
    ]
    assert inter == [pytest.approx(5.2947 * 7 / 8, rel=1e-4), pytest.approx(3.5, rel=1e-9)]


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (lambda to, rows: to.exchange(rows, "node"), "node and local once each"),
        (lambda to, rows: to.exchange(to.dedup(rows, "node"), "node", "local"), "ends per node"),
        (lambda to, rows: to.dedup(to.dedup(rows, "node"), "rank"), "merged per node"),
    ],
)
def test_a_program_that_does_not_deliver_is_refused(program: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        steps_of(program)


def test_padding_and_merging_exclude_each_other() -> None:
    mesh = Mesh(nodes=2, local=2)
    routing = UniformRouting(mesh=mesh, num_tokens=8, top_k=2, num_experts=4, capacity_factor=1.25)
    with pytest.raises(ConfigError, match=r"capacity_factor=1.25 .*nearest legal: 1.0"):
        traffic_of(round_trip(PROGRAMS["node_dedup"], mesh), routing, SIZE)


def test_experts_that_do_not_fit_their_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts=3 must be at least the 4 expert ranks"):
        UniformRouting(mesh=Mesh(nodes=2, local=2), num_tokens=1, top_k=1, num_experts=3)
    with pytest.raises(
        ConfigError, match="node_limit=1 is of nodes with as many experts each, and 6 on 4 ranks are not"
    ):
        UniformRouting(mesh=Mesh(nodes=2, local=2), num_tokens=1, top_k=1, num_experts=6, node_limit=1)
