"""`turnout plan placement`: what a run routed, placed in order, by EPLB and by the search."""

import json
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Turnout
from turnout.trace import SOURCES_NAME, TRACE_NAME, TraceHeader

EXPERTS, STEPS = 32, 3  # of tiny; of the run
LAYERS = ("blocks.0", "blocks.1")
ASKED = ("--ranks", "4", "--hosts", "2", "--json")


@pytest.fixture
def placement(turnout: Turnout) -> Turnout:
    """`turnout plan placement tiny`."""
    return partial(turnout, "plan", "placement", "tiny")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The first experts have most, in the first layer; a tenth is dropped everywhere."""
    header = TraceHeader(layers=LAYERS, num_experts=(EXPERTS,) * 2)
    counts = np.array([1000 // (1 + np.arange(EXPERTS)), np.full(EXPERTS, 100)]).flatten()
    path = tmp_path / "run" / TRACE_NAME
    path.parent.mkdir(parents=True)
    records = [
        struct.pack("<Q", step) + (10 * counts).astype("<u4").tobytes() + counts.astype("<u4").tobytes()
        for step in range(1, STEPS + 1)
    ]
    path.write_bytes(header.encode() + b"".join(records))
    return tmp_path / "run"


def test_ways_are_compared_layer_by_layer_and_in_the_mean(placement: Turnout, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    answer = placement(str(run), *ASKED, "--csv", str(file), "--redundant", "4").last
    rows = {(row["layer"], row["way"]): row for row in answer["rows"]}
    assert len(rows) == len(answer["rows"]) == len(file.read_text().splitlines()) - 1 == 3 * 5
    loads = 9.0 * (1000 // (1 + np.arange(EXPERTS)))
    first = rows["blocks.0", "contiguous"]
    assert first["max_load"] == pytest.approx(4 * loads[:8].sum() / loads.sum())
    # every rank alike: half of the rows cross, 64 numbers of two bytes, four times
    assert first["inter_bytes_a_token"] == pytest.approx(4 * 64 * 2 / 2)
    assert (first["move_inter_bytes"], first["pays_after"]) == (0, 0)
    for layer in (*LAYERS, "all"):
        steps = [rows[layer, way]["step_s"] for way in ("contiguous", "eplb", "turnout")]
        assert steps[2] <= min(steps[:2]) * (1 + 1e-9)
    assert rows["blocks.0", "turnout"]["max_load"] < 0.5 * first["max_load"]
    assert rows["blocks.0", "turnout"]["pays_after"] < 100
    assert rows["blocks.1", "turnout"]["move_inter_bytes"] == 0, "what is even stays"
    assert rows["blocks.0", "eplb + copies"]["max_load"] < rows["blocks.0", "eplb"]["max_load"]
    assert rows["blocks.0", "eplb + copies"]["move_s"] is None
    for layer in (*LAYERS, "all"):
        assert rows[layer, "turnout + copies"]["step_s"] <= rows[layer, "turnout"]["step_s"] * (1 + 1e-9)
    assert rows["blocks.0", "turnout + copies"]["move_s"] >= 0
    mean = (first["max_load"] + rows["blocks.1", "contiguous"]["max_load"]) / 2
    assert rows["all", "contiguous"]["max_load"] == pytest.approx(mean)
    assert answer["sources"] == "alike"


def test_rows_from_hosts_that_want_other_experts_are_brought_to_them(placement: Turnout, run: Path) -> None:
    wanted = np.arange(EXPERTS) % 2
    rows = [[float(90 if want == rank // 2 else 10) for want in wanted] for rank in range(4)]
    lines = [{"step": step, "layers": dict.fromkeys(LAYERS, rows)} for step in (2, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # the last line was cut by a kill
    (run / SOURCES_NAME).write_text(text + json.dumps(lines[0])[:40])
    answer = placement(str(run), *ASKED).last
    assert answer["sources"] == "recorded"
    far = {row["way"]: row["inter_bytes_a_token"] for row in answer["rows"] if row["layer"] == "blocks.0"}
    assert far["contiguous"] == pytest.approx(256)
    assert far["turnout"] == pytest.approx(512 * 0.1)
    assert placement(str(run), "--ranks", "2", "--json").last["sources"] == "alike", "of another number of ranks"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--ranks", "3", "--hosts", "2"), "--hosts 2 must divide --ranks 3; nearest legal: --ranks 4"),
        (("--ranks", "64"), "has 32 experts, and each rank holds at least one; nearest legal: 32"),
        (("--ranks", "4", "--last", "-1"), "--last -1 must be at least 0"),
        (("--ranks", "4", "--groups", "3"), "groups=3 must divide num_experts=32"),
        (("--ranks", "4", "--precision", "bf61"), "precision='bf61' is not one H100-SXM-80GB computes in"),
        (("--ranks", "4", "--every", "0"), "prices.period=0 must be at least 1"),
    ],
)
def test_what_cannot_be_placed_is_refused(args: tuple[str, ...], text: str, placement: Turnout, run: Path) -> None:
    result = placement(str(run), *args)
    assert result.code == 2
    assert text in " ".join(result.err.split())


def test_a_run_of_another_model_or_without_experts_is_refused(turnout: Turnout, run: Path, tmp_path: Path) -> None:
    other = turnout("plan", "placement", "mixtral-8x7b", str(run), "--ranks", "4")
    assert other.code == 2
    assert "has 32 experts; mixtral-8x7b has 8 a layer" in " ".join(other.err.split())
    dense = turnout("plan", "placement", "tiny-dense", str(run), "--ranks", "4")
    assert "has no experts to place" in dense.err
    empty = turnout("plan", "placement", "tiny", str(tmp_path), "--ranks", "4")
    assert "has no trace/counts.bin" in " ".join(empty.err.split())
