"""Blocks of rows on their way: every block arrives, and what one rank sends is what the other receives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.alltoall import PROGRAMS, itinerary
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Mesh

meshes = st.builds(Mesh, nodes=st.integers(1, 4), local=st.integers(1, 4))


@pytest.mark.parametrize("name", PROGRAMS.names())
@given(mesh=meshes)
def test_every_block_arrives_at_its_destination(name: str, mesh: Mesh) -> None:
    for rank in range(mesh.size):
        last = itinerary(PROGRAMS[name], mesh, rank)[-1]
        assert sorted(last.held) == [(source, rank) for source in range(mesh.size)]


@pytest.mark.parametrize("name", PROGRAMS.names())
@given(mesh=meshes)
def test_what_is_sent_is_what_is_received(name: str, mesh: Mesh) -> None:
    legs = [itinerary(PROGRAMS[name], mesh, rank) for rank in range(mesh.size)]
    for of_step in zip(*legs, strict=True):
        for rank, leg in enumerate(of_step):
            for peer, blocks in zip(leg.peers, leg.sent, strict=True):
                other = of_step[peer]
                assert other.received[other.peers.index(rank)] == blocks


def test_blocks_of_the_two_level_exchange_lie_by_source_in_the_end() -> None:
    """On a grid that is not square, where the printed index of Tutel's algorithm 2 is wrong."""
    mesh = Mesh(nodes=3, local=2)
    assert itinerary(PROGRAMS["hierarchical"], mesh, 3)[-1].held == tuple((source, 3) for source in range(6))


def test_rows_merged_per_node_are_not_sent_to_ranks() -> None:
    def early(to: object, rows: object) -> object:
        rows = to.dedup(rows, "node")  # type: ignore[attr-defined]
        rows = to.exchange(rows, "node", "local")  # type: ignore[attr-defined]
        return to.expand(rows, "assignment")  # type: ignore[attr-defined]

    with pytest.raises(ConfigError, match="expand rows merged per node before it exchanges along local"):
        itinerary(early, Mesh(nodes=2, local=2), 0)  # type: ignore[arg-type]


@given(ranks=st.integers(1, 9), each=st.integers(1, 5), rest=st.integers(0, 8))
def test_experts_lie_evenly_on_ranks(ranks: int, each: int, rest: int) -> None:
    num_experts = ranks * each + rest % ranks
    placement = Placement.even(num_experts, ranks)
    runs = [placement.slots_of(rank) for rank in range(ranks)]
    assert [expert for run in runs for expert in run] == list(range(num_experts))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert (placement.ranks, placement.num_experts) == (ranks, num_experts)


@given(rank_of=st.lists(st.integers(0, 3), min_size=4, max_size=20))
def test_every_expert_lies_where_it_was_placed(rank_of: list[int]) -> None:
    rank_of[:4] = [3, 1, 0, 2]
    placement = Placement.of(rank_of, 4)
    assert placement.rank_of == tuple(rank_of)
    held = [placement.experts_of(rank) for rank in range(4)]
    assert placement.expert_at == tuple(expert for experts in held for expert in experts)
    assert [placement.slots_of(rank).stop for rank in range(4)] == list(placement.bounds[1:])
    for rank in range(4):
        spelt = [run.expert + at for run in placement.runs_of(rank) for at in range(run.length)]
        assert tuple(spelt) == held[rank] == tuple(sorted(held[rank]))
    assert placement.experts_near((2, 3)) == tuple(e for e, rank in enumerate(rank_of) if rank > 1)


def test_one_placement_is_one_value() -> None:
    assert Placement((0, 2, 3), (0, 1, 2)) == Placement((0, 2, 3)) == Placement.of((0, 0, 1), 2)
    assert Placement((0, 2, 3), (1, 0, 2)) != Placement((0, 2, 3))
    assert [run.row for run in Placement((0, 2, 3), (1, 0, 2)).runs] == [1, 0, 0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Placement.even(3, 4), "3 experts cannot lie on 4 ranks.*nearest legal: ep=3"),
        (lambda: Placement((0, 2, 2)), r"placement.bounds=\(0, 2, 2\) must start at 0 and rise"),
        (lambda: Placement((0,)), "must start at 0 and rise"),
        (
            lambda: Placement((0, 1, 3), (2, 1, 1)),
            r"placement.order=\(2, 1, 1\) must hold in 3 slots each of the experts",
        ),
        (lambda: Placement.of((0, 2, 2), 3), "every rank holds an expert"),
    ],
)
def test_a_placement_gives_every_rank_an_expert(make: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()  # type: ignore[operator]
