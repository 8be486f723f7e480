"""The planner reads what a training run of Turnout recorded."""

import json
from pathlib import Path

import pytest

from turnout.data.prepare import Dataset
from turnout.trace import read_trace
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest

DIMS = """
num_layers = 2
dim = 16
vocab_size = 300
num_heads = 2
num_kv_heads = 1
head_dim = 8
num_experts = 4
top_k = 2
expert_hidden = 16
"""


def test_a_trained_run_is_planned_with_its_own_routing(
    turnout, small_recipe: Recipe, small_dataset: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer(small_recipe, small_dataset, tmp_path / "run")
    trainer.train(StopRequest())
    trainer.finish()
    (tmp_path / "model.toml").write_text(DIMS)
    trace = read_trace(tmp_path / "run")
    asked = ("plan", "volume", str(tmp_path / "model.toml"), "--devices", "4", "--batch", "4", "--seq", "16")
    result = turnout(*asked, "--layout", "ep=4", "--trace", str(tmp_path / "run"), "--json")
    assert result.code == 0, result.err
    answer = json.loads(result.out.splitlines()[-1])
    assert [row["name"] for row in answer["layers"]] == list(trace.layers)
    for row, counts in zip(answer["layers"], trace.counts, strict=True):
        loads = counts.sum(axis=0)
        assert row["skew"] == pytest.approx(4 * loads.max() / loads.sum())
        assert row["busiest_bytes"] == pytest.approx(row["skew"] * row["uniform_intra_bytes"])
    assert 1 <= answer["mean_skew"] <= answer["worst_skew"]
    common = (*asked[2:], "--layout", "ep=4", "--json")
    # a job so small waits for its host: the step is as long, what is computed is not
    for verb, read in (
        ("time", lambda answer: answer["parts"]["compute"]),
        ("memory", lambda answer: answer["peak_bytes"]),
    ):
        even, recorded = (
            json.loads(turnout("plan", verb, *common, *more).out.splitlines()[-1])
            for more in ((), ("--trace", str(tmp_path / "run")))
        )
        assert read(recorded) > read(even)
