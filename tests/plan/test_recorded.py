"""A recorded run in place of uniform routing: loads, skew and bytes are those of its trace."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Turnout
from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.observe.trace import TraceHeader, TraceWriter
from turnout.plan.layout import layout_of
from turnout.plan.query import Query
from turnout.plan.recorded import layer_traffic, mean_skew, recorded_loads, skew_of, with_recorded, worst_skew
from turnout.plan.shapes import SHAPES
from turnout.plan.step import Step, step_of
from turnout.plan.volume import volume

# of mixtral-8x7b on 16 devices of two nodes
LAYOUTS = ("ep=8", "ep=4,alltoall=rank_dedup", "pp=2,ep=8,alltoall=node_dedup", "tp=2,ep=8,alltoall=hierarchical",
           "tp=2,ep=4,recompute=full", "ep=8,overlap=2")  # fmt: skip
LAYERS, EXPERTS = 32, 8


def write_run(run: Path, steps: list[np.ndarray], dropped: list[np.ndarray] | None = None) -> Path:
    """A run whose trace has these counts [layers, experts] of each step."""
    layers, experts = steps[0].shape
    header = TraceHeader(layers=tuple(f"blocks.{i}.moe" for i in range(layers)), num_experts=(experts,) * layers)
    writer = TraceWriter(run, header)
    for number, counts in enumerate(steps, start=1):
        lost = np.zeros_like(counts) if dropped is None else dropped[number - 1]
        writer.append(number, counts.reshape(-1), lost.reshape(-1))
    writer.file.close()
    return run


def step_and_parts(layout: str) -> tuple[Step, tuple]:
    query = Query(
        model="mixtral-8x7b", cluster="dgx-h100", devices=16, seq_len=1024, global_batch=64, strategy=layout_of(layout)
    )
    step = step_of(query.job(), CLUSTERS["dgx-h100"].devices_per_node)
    return step, volume(step)


# --- loads ---


def test_loads_are_what_reached_each_expert(tmp_path: Path) -> None:
    counts = [np.full((LAYERS, EXPERTS), 10 + step) for step in range(3)]
    lost = [np.zeros((LAYERS, EXPERTS), int) for _ in range(3)]
    counts[1][5, 2], lost[1][5, 2] = 40, 7
    found = recorded_loads(write_run(tmp_path, counts, lost), SHAPES["mixtral-8x7b"])
    assert list(found) == list(SHAPES["mixtral-8x7b"].sparse_layers)
    assert found[0].loads == (33.0,) * EXPERTS
    assert found[5].loads == (33.0, 33.0, 10 + 33 + 12, *(33.0,) * 5)
    assert found[5].dropped_share == pytest.approx(7 / (33 * 7 + 62))
    assert found[5].by_step[1] == (11.0, 11.0, 33.0, *(11.0,) * 5)


def test_skew_is_of_ranks_of_neighbouring_experts(tmp_path: Path) -> None:
    loads = (4.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    assert skew_of(loads, 8) == 4.0
    assert skew_of(loads, 4) == 2.0
    assert skew_of(loads, 1) == 1.0
    # one step favours the first rank, the next one the last: each step waits, the whole run is even
    counts = [np.ones((LAYERS, EXPERTS), int) for _ in range(2)]
    counts[0][:, 0], counts[1][:, 7] = 9, 9
    found = recorded_loads(write_run(tmp_path, counts), SHAPES["mixtral-8x7b"])
    assert found[0].skew(2) == pytest.approx(1.0)
    assert mean_skew(found, 2) == pytest.approx(12 / 8)
    assert worst_skew(found, 8) == pytest.approx(9 / 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_even_loads_send_what_uniform_routing_sends(layout: str, tmp_path: Path) -> None:
    found = recorded_loads(write_run(tmp_path, [np.full((LAYERS, EXPERTS), 7)]), SHAPES["mixtral-8x7b"])
    step, parts = step_and_parts(layout)
    for uniform, recorded in zip(parts, with_recorded(step, parts, found), strict=True):
        assert recorded.name == uniform.name
        for name in ("calls", "intra_bytes", "inter_bytes", "messages"):
            assert getattr(recorded, name) == pytest.approx(getattr(uniform, name), rel=1e-9), (recorded.name, name)
    for row in layer_traffic(step, found):
        assert row.busiest_bytes == pytest.approx(row.uniform.total_bytes)


@given(loads=st.lists(st.integers(1, 1000), min_size=EXPERTS, max_size=EXPERTS), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=30, deadline=None)
def test_uneven_loads_send_no_more_in_all_and_most_to_the_busiest(
    loads: list[int], layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = write_run(tmp_path_factory.mktemp("run"), [np.tile(loads, (LAYERS, 1))])
    step, _ = step_and_parts(layout)
    found = recorded_loads(run, SHAPES["mixtral-8x7b"])
    row = next(layer_traffic(step, found))
    # who merges rows sends fewer where tokens crowd; who does not sends as many, but to other ranks
    assert row.recorded.total_bytes <= row.uniform.total_bytes * (1 + 1e-9)
    if step.strategy.alltoall == "flat":
        assert row.recorded.total_bytes == pytest.approx(row.uniform.total_bytes)
        assert row.busiest_bytes == pytest.approx(row.uniform.total_bytes * row.skew)
    assert row.busiest_bytes >= row.recorded.total_bytes * (1 - 1e-9)


# --- the command line ---


@pytest.fixture
def volume_of(turnout: Turnout) -> Turnout:
    """`turnout plan volume`."""
    return partial(turnout, "plan", "volume")


ASKED = ("mixtral-8x7b", "--devices", "16", "--batch", "64", "--seq", "1024", "--layout", "ep=8")


def test_volume_tells_a_run_from_uniform_routing(volume_of: Turnout, tmp_path: Path) -> None:
    counts = np.ones((LAYERS, EXPERTS), int)
    counts[:, 3] = 9
    run = write_run(tmp_path, [counts])
    code, out, err = volume_of(*ASKED, "--trace", str(run), "--json")
    assert code == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert len(answer["layers"]) == LAYERS
    assert answer["mean_skew"] == answer["worst_skew"] == pytest.approx(9 / 2)
    assert answer["step_s"] > answer["uniform_step_s"]
    assert answer["peak_bytes"] > answer["uniform_peak_bytes"]
    assert answer["intra_bytes"] == pytest.approx(sum(row["intra_bytes"] for row in answer["collectives"]))
    assert {"skew", "intra_bytes", "uniform_intra_bytes", "busiest_bytes"} <= answer["layers"][0].keys()
    code, out, err = volume_of(*ASKED, "--trace", str(run), "--layer", "7")
    assert (code, err) == (0, "")
    assert "31 (blocks.7.moe)" in out
    assert "a step takes" in out


BAD = {
    "no trace": (("--trace", "nowhere"), r"nowhere has no trace/counts\.bin"),
    "layer": (("--trace", "run", "--layer", "40"), r"--layer 40 must be all, or in 0\.\.31; nearest legal: 31"),
    "layer of nothing": (("--layer", "3"), r"--layer 3 is of a trace; give --trace RUN too"),
    "word": (("--trace", "run", "--layer", "last"), r"--layer last must be all, or in 0\.\.31; nearest legal: all"),
    "other layers": (("--trace", "small"), r"the trace has 2 layers, the model 32 with experts"),
    "other experts": (("--trace", "small", "--layer", "0"), r"has 4 experts; block 0 of the model has 8"),
    "not a trace": (("--trace", "broken"), r"is not a trace of Turnout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_one_clear_error(
    case: str, volume_of: Turnout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, pattern = BAD[case]
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), [np.ones((LAYERS, EXPERTS), int)])
    write_run(Path("small"), [np.ones((2, 4), int)])
    Path("broken/trace").mkdir(parents=True)
    Path("broken/trace/counts.bin").write_bytes(b"no trace at all")
    code, out, err = volume_of(*ASKED, *args)
    assert (code, out) == (2, ""), (out, err)
    assert re.search(pattern, " ".join(err.split())), err


def test_a_dense_model_has_no_use_for_a_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no experts; a trace tells of a model that has"):
        recorded_loads(tmp_path, SHAPES["llama3-8b"])
