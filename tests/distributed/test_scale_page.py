"""The page of bytes and messages from 8 to 10,240 ranks: closed forms, and the processes' own transport."""

import pytest

from benchmarks import scale_page
from benchmarks.scale_page import LAYERS, NODE, TOKENS, traffic
from turnout.topology import mesh_of


def test_messages_and_bytes_are_the_closed_forms() -> None:
    layer, ranks = LAYERS[-1], 10_240
    mesh = mesh_of(ranks, NODE)
    flat, grid = (traffic(layer, mesh, program) for program in ("flat", "hierarchical"))
    assert (flat.intra_messages, flat.inter_messages) == (2 * (NODE - 1), 2 * (ranks - NODE))
    assert (grid.intra_messages, grid.inter_messages) == (2 * (NODE - 1), 2 * (ranks // NODE - 1))
    row_bytes = 2 * TOKENS * layer.top_k * 2 * layer.dim
    for each in (flat, grid):
        assert each.inter_bytes == pytest.approx(row_bytes * (1 - NODE / ranks))
    assert flat.intra_bytes == pytest.approx(row_bytes * (NODE - 1) / ranks)
    assert grid.intra_bytes == pytest.approx(row_bytes * (NODE - 1) / NODE)


def test_the_transport_of_one_of_many_processes_hands_over_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_page, "FAKE_WORLD", 512)
    # raises where ledger and planner differ
    rows = list(scale_page._fake_rows(77))
    assert [row[1] for row in rows] == ["flat", "hierarchical"]
    assert [row[-1] for row in rows] == ["112", "14"]
