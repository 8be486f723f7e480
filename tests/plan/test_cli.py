"""`turnout plan`: JSON last with the promised keys, one clear error for bad use, never torch."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Turnout
from tests.plan.test_hf_config import DEEPSEEK
from turnout.plan.shapes import SHAPES
from turnout.plan.sources import SOURCES
from turnout.plan.validate import Validation

LAYOUT = ("mixtral-8x7b", "--nodes", "4", "--batch", "256", "--layout", "tp=2,pp=4,ep=4")
ROW = {
    "id": "one", "suite": "mine", "model": "llama3-70b", "gpus": 64, "gpu": "H100-SXM80", "precision": "bf16",
    "layout": {"tp": 8, "pp": 1, "cp": 1}, "mbs": 1, "gbs": 128, "seq": 8192, "quantity": "step_time", "unit": "s",
    "value": 20.0,
}  # fmt: skip


@pytest.fixture
def plan(turnout: Turnout) -> Turnout:
    """`turnout plan`."""
    return partial(turnout, "plan")


# --- answers ---

ANSWERS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "volume": (("volume", *LAYOUT), {"collectives", "intra_bytes", "inter_bytes", "layout", "model"}),
    "memory": (("memory", *LAYOUT), {"stages", "peak_bytes", "device_bytes", "fits", "over_bytes", "remedies"}),
    "time": (
        ("time", *LAYOUT, "--what-if", "--run-tokens", "1e12"),
        {"step_s", "parts", "tokens_per_s", "mfu", "bill", "twins", "what_if"},
    ),
    "search": (
        ("search", "mixtral-8x7b", "--nodes", "2", "--batch", "16", "--seq", "2048", "--why-not", "tp=8"),
        {"best", "considered", "seconds", "pareto", "why_not"},
    ),
    "explain": (("explain",), {"rows", "model", "cluster"}),
    "models": (("models",), {"models"}),
    "clusters": (("clusters",), {"clusters"}),
}


@pytest.mark.parametrize("verb", ANSWERS)
def test_json_is_the_last_line_and_the_only_one_on_stdout(verb: str, plan: Turnout) -> None:
    args, keys = ANSWERS[verb]
    result = plan(*args, "--json")
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 1
    assert keys <= result.last.keys()
    shown = plan(*args)
    assert (shown.code, shown.err) == (0, "")
    assert len(shown.out.splitlines()) > 5


@pytest.mark.parametrize(
    "verb", ["volume", "memory", "time", "explain", "validate", "predict", "search", "placement", "models", "clusters"]
)
def test_every_verb_has_help_with_an_example(verb: str, plan: Turnout) -> None:
    result = plan(verb, "--help")
    assert result.code == 0
    assert f"turnout plan {verb}" in " ".join(result.out.split())
    assert "Example" in result.out


def test_volume_gives_what_a_step_sends(plan: Turnout) -> None:
    answer = plan("volume", *LAYOUT, "--json").last
    assert {"name", "intra_bytes", "inter_bytes", "messages", "seconds"} <= answer["collectives"][0].keys()
    for tier in ("intra_bytes", "inter_bytes"):
        assert answer[tier] == pytest.approx(sum(row[tier] for row in answer["collectives"]))
    assert {"tp all-reduce", "ep all-to-all"} <= {row["name"] for row in answer["collectives"]}


def test_blocks_for_further_tokens_cost_what_they_compute_hold_and_send(plan: Turnout, tmp_path: Path) -> None:
    args = ("deepseek-v3", "--cluster", "h800", "--nodes", "16", "--batch", "512", "--layout", "pp=4,ep=32,folded=true")

    def answers(verb: str, key: str, model: str = "deepseek-v3") -> list[Any]:
        asked = (model, *args[1:])
        return [plan(verb, *asked, "--mtp-layers", each, "--json").last[key] for each in ("-1", "0", "1")]

    for verb, key in (("time", "step_s"), ("volume", "intra_bytes")):
        usual, without, one = answers(verb, key)
        assert usual == without < one
    # all stages: the last one gets fewer other blocks beside one that predicts
    usual, without, one = (sum(each["weights_bytes"] for each in stages) for stages in answers("memory", "stages"))
    assert usual == without < one
    assert "deepseek-v3, 1 block for further tokens, on 128 x" in plan("volume", *args, "--mtp-layers", "1").out
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK | {"num_nextn_predict_layers": 1}))
    usual, without, one = answers("time", "step_s", str(tmp_path / "config.json"))
    assert usual == one > without


def test_experts_may_lie_unevenly(plan: Turnout) -> None:
    args = ("qwen3-30b-a3b", "--nodes", "3", "--batch", "240", "--layout")
    six, eight = (plan("time", *args, layout, "--json").last for layout in ("ep=6,zero=1", "ep=8,zero=1"))
    assert six["skew"] == pytest.approx(22 * 6 / 128)
    assert six["peak_bytes"] > eight["peak_bytes"]
    assert "skew 1.031, for ep=6 does not divide 128 experts" in plan("volume", *args, "ep=6").out
    # a search tries what divides, unless it is asked for
    best = plan("search", *args, "ep=6,tp=1,pp=1,zero=3", "--json").last["best"]
    assert {row["layout"]["ep"] for row in best} == {6}
    refused = plan("time", "deepseek-v3", "--nodes", "24", "--batch", "960", "--layout", "ep=96,zero=3")
    assert refused.code == 2
    assert "ep=96 must divide num_experts=256; nearest legal: 64" in refused.err


def test_skew_and_capacity_reach_bytes_seconds_and_memory(plan: Turnout) -> None:
    def answers(verb: str) -> list[dict[str, Any]]:
        asked = ([], ["--skew", "1.5"], ["--capacity-factor", "1.5"])
        return [plan(verb, *LAYOUT, *more, "--json").last for more in asked]

    even, skewed, padded = answers("volume")
    assert padded["intra_bytes"] > even["intra_bytes"] == skewed["intra_bytes"]
    assert [(row["skew"], row["capacity_factor"]) for row in (even, skewed, padded)] == [(1, 0), (1.5, 0), (1, 1.5)]
    exchanged = [next(row for row in each["collectives"] if row["axis"] == "ep") for each in (even, skewed, padded)]
    assert [row["busiest_bytes"] / exchanged[0]["busiest_bytes"] for row in exchanged] == pytest.approx([1, 1.5, 1.5])
    assert exchanged[1]["seconds"] == pytest.approx(1.5 * exchanged[0]["seconds"])
    for verb, name in (("time", "step_s"), ("memory", "peak_bytes")):
        even, skewed, padded = (answer[name] for answer in answers(verb))
        assert skewed > 1.05 * even
        assert padded == pytest.approx(skewed, rel=0.01)
    shown = plan("volume", *LAYOUT, "--skew", "9").out
    assert "busiest GB" in shown
    assert "skew 4 (9 asked: no rank gets more than all rows)" in shown


def test_the_parts_of_a_step_sum_to_it_and_every_change_is_answered(plan: Turnout) -> None:
    answer = plan("time", *LAYOUT, "--what-if", "--json").last
    assert sum(answer["parts"].values()) == pytest.approx(answer["step_s"])
    assert answer["tokens_per_s"] == pytest.approx(256 * 4096 / answer["step_s"])
    assert 0 < answer["mfu"] < 1
    faster = next(row for row in answer["what_if"] if "network cards" in row["change"])
    assert faster["step_s"] <= answer["step_s"]
    assert all((row["step_s"] is None) == bool(row["why_not"]) for row in answer["what_if"])
    assert len(answer["twins"]) == 3


def test_a_job_that_does_not_fit_says_by_how_much_and_what_would_make_it_fit(plan: Turnout) -> None:
    args = ("memory", "mixtral-8x7b", "--nodes", "4", "--batch", "256", "--layout", "tp=2,ep=4")
    answer = plan(*args, "--json").last
    assert not answer["fits"]
    assert answer["over_bytes"] > 0
    assert all(way["over_bytes"] <= 0 for way in answer["remedies"])
    assert len(answer["remedies"]) > 0
    shown = plan(*args).out
    assert "does not fit" in shown
    assert "What would make it fit" in shown


def test_the_claim_is_reproduced_on_the_command_line(plan: Turnout) -> None:
    rows = {row["scenario"]: row["inter_over_intra"] for row in plan("explain", "--json").last["rows"]}
    for name in ("no experts", "no experts, scatter-gather", "no experts, fp32 gradients"):
        assert 0.02 <= rows[name] <= 0.10
    assert rows["16 experts, all-to-all alone"] == pytest.approx(1.07, abs=0.005)
    assert 1.0 <= rows["16 experts, top-2"] <= 1.2
    assert rows["tokens shared over tp, all-to-all alone"] == pytest.approx(0.13, abs=0.005)


def test_search_gives_layouts_that_fit_best_first(plan: Turnout, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    answer = plan(*ANSWERS["search"][0], "--csv", str(file), "--json").last
    assert len(file.read_text().splitlines()) == 1 + len(answer["best"])
    assert {"layout", "step_s", "mfu", "memory_gib", "usd_per_step"} <= answer["best"][0].keys()
    assert [row["step_s"] for row in answer["best"]] == sorted(row["step_s"] for row in answer["best"])
    assert all(row["memory_gib"] < 80e9 / 2**30 for row in answer["best"])
    assert answer["why_not"]["text"]


def test_search_keeps_what_is_decided(plan: Turnout) -> None:
    args = ("search", "mixtral-8x7b", "--nodes", "2", "--batch", "16", "--seq", "2048", "--layout")
    best = plan(*args, "tp=4,sp=true,zero=1,precision=fp8", "--json").last["best"]
    assert len(best) > 1
    kept = {"tp": 4, "sequence_parallel": True, "zero": 1, "precision": "fp8"}
    assert all({name: row["layout"][name] for name in kept} == kept for row in best)
    refused = plan(*args, "dp=4")
    assert refused.code == 2
    assert "dp follows from the devices" in refused.err


def test_a_price_is_what_a_layout_is_billed_at(plan: Turnout) -> None:
    args = (
        "search",
        "tiny",
        "--devices",
        "1",
        "--batch",
        "8",
        "--seq",
        "256",
        "--usd-per-device-hour",
        "3.6",
        "--json",
    )
    best = plan(*args).last["best"][0]
    assert best["usd_per_step"] == pytest.approx(best["step_s"] * 1e-3)


def test_where_nothing_fits_search_fails_and_says_what_is_needed(plan: Turnout) -> None:
    result = plan("search", "llama3.1-405b", "--nodes", "1", "--batch", "8")
    assert result.code == 1
    assert re.search(r"none of \d+ legal layouts fits 74\.5 GiB; the least needs [\d,.]+ GiB", result.out)


@pytest.mark.parametrize("layout", ["tp=4", ""])
@pytest.mark.parametrize("verb", ["volume", "memory", "time"])
def test_a_device_without_bf16_trains_in_fp16_unless_told_otherwise(verb: str, layout: str, plan: Turnout) -> None:
    args = (verb, "olmoe-1b-7b", "--cluster", "dgx2-v100", "--nodes", "1", "--batch", "64")
    answer = plan(*args, "--layout", layout, "--json").last
    assert "precision=fp16" in answer["layout"]


@pytest.mark.parametrize("verb", ["volume", "memory", "time"])
def test_without_a_layout_the_searchs_pick_is_taken_and_said(verb: str, plan: Turnout) -> None:
    result = plan(verb, "tiny", "--devices", "1", "--batch", "8", "--seq", "256", "--json")
    assert result.code == 0, result.err
    assert re.search(r"no --layout: the fastest that fits of \d+ searched", result.err)
    assert result.last["layout"].startswith("tp=1,pp=1")


@pytest.mark.parametrize("verb", ["volume", "memory", "explain", "time"])
def test_csv_has_a_line_for_every_row(verb: str, plan: Turnout, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    result = plan(*ANSWERS[verb][0], "--csv", str(file), "--json")
    assert result.code == 0, result.err
    key = {"volume": "collectives", "memory": "stages", "explain": "rows", "time": "parts"}[verb]
    assert len(file.read_text().splitlines()) == 1 + len(result.last[key])


@pytest.mark.parametrize("args", [("explain",), ("time", *LAYOUT)])
def test_plots_are_files_of_the_kind_their_name_says(args: tuple[str, ...], plan: Turnout, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    assert plan(*args, "--plot", str(file)).code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    refused = plan(*args, "--plot", str(tmp_path / "plot.doc"))
    assert refused.code == 2
    assert "must end in one of" in refused.err


def test_a_plot_without_matplotlib_names_the_extra(
    plan: Turnout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turnout.plan.charts.find_spec", lambda name: None)
    result = plan("explain", "--plot", str(tmp_path / "plot.png"))
    assert result.code == 2
    assert "turnout[plot]" in result.err


def test_a_model_may_be_a_file_of_dimensions_or_a_folder_with_a_config(plan: Turnout, tmp_path: Path) -> None:
    dims = (
        "num_layers = 4\ndim = 64\nvocab_size = 256\nnum_heads = 4\nnum_kv_heads = 4\nhead_dim = 16\nffn_hidden = 256"
    )
    (tmp_path / "own.toml").write_text(dims)
    config = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 256, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    rest = ("--devices", "1", "--batch", "8", "--seq", "256", "--layout", "tp=1", "--json")
    own = plan("memory", str(tmp_path / "own.toml"), *rest)
    assert own.last["model"] == "own"
    assert own.last["peak_bytes"] == plan("memory", str(tmp_path), *rest).last["peak_bytes"]


# --- rows ---


def test_predict_answers_and_refuses_row_by_row(plan: Turnout, tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    rows = [ROW, ROW | {"id": "two", "gpu": "Abacus"}, 3, ROW | {"id": "four", "dims": {"layers": "x"}}]
    file.write_text(json.dumps({"rows": rows}))
    table = tmp_path / "answers.csv"
    answer = plan("predict", "--cases", str(file), "--csv", str(table), "--json").last["rows"]
    assert table.read_text().startswith("id,predicted,unit,refused\none,")
    assert len(table.read_text().splitlines()) == 1 + len(answer)
    assert [row["id"] for row in answer] == ["one", "two", "", "four"]
    assert answer[0]["predicted"] > 0
    assert answer[0]["unit"] == "s"
    assert answer[0]["refused"] is None
    assert [row["predicted"] for row in answer[1:3]] == [None, None]
    assert "'Abacus'" in answer[1]["refused"]
    assert answer[2]["refused"] == "the row is int, not an object"


def test_validate_judges_a_file_and_names_what_it_refuses(plan: Turnout, tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([ROW, "x", ROW | {"id": "two", "value": "many"}]))
    table = tmp_path / "suites.csv"
    result = plan("validate", "--cases", str(file), "--refused", "--csv", str(table), "--json")
    assert result.code == 0, result.err
    assert len(table.read_text().splitlines()) == 1 + len(result.last["suites"])
    by_suite = {row["suite"]: row for row in result.last["suites"]}
    assert (by_suite["mine"]["n"], by_suite["mine"]["refused"]) == (1, 1)
    assert by_suite[""]["refused"] == 1
    assert "not an object" in result.err
    assert {"suite", "split", "mape", "median", "p90", "max", "bias", "skill", "spearman", "regret"} <= set(
        by_suite["mine"]
    )


def test_validate_prints_the_protocol(
    plan: Turnout, judged: tuple[Validation, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turnout.plan.validate.validate", lambda document: judged[0])
    result = plan("validate", "--json")
    assert result.code == 0, result.err
    assert {"suites", "memory", "oom", "refusals", "seconds"} <= result.last.keys()
    for words in ("const. MFU", "Calculon 12.9% on 103", "SimuMax 5.6% on 43", "F1", "rows refused"):
        assert words in result.err


# --- bad use ---

CLUSTER = 'base = "dgx-h100"\n[inter]\nbytes_per_s = "400 GHz"\n'
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "layout that does not divide": (
        ("time", "mixtral-8x7b", "--nodes", "4", "--layout", "tp=3"),
        r"strategy\.tp=3 .* must divide world=32; nearest legal",
    ),
    "experts that do not divide": (
        ("time", "mixtral-8x7b", "--nodes", "4", "--layout", "tp=2,ep=3"),
        r"strategy\.ep=3 must divide dp \* cp=16; nearest legal: 2",
    ),
    "unknown field": (
        ("memory", "mixtral-8x7b", "--nodes", "4", "--layout", "tpp=2"),
        r"unknown field 'strategy\.tpp'.*did you mean 'tp'",
    ),
    "wrong kind of value": (
        ("memory", "mixtral-8x7b", "--nodes", "4", "--layout", "tp=two"),
        r"strategy\.tp='two' must be an integer",
    ),
    "value that is none": (
        ("memory", "mixtral-8x7b", "--nodes", "4", "--layout", "recompute=ful"),
        r"strategy\.recompute='ful' must be one of: none, light, selective, full; did you mean 'full'",
    ),
    "unknown program": (
        ("volume", "mixtral-8x7b", "--nodes", "4", "--layout", "alltoall=hierarchic"),
        r"strategy\.alltoall='hierarchic' must be one of: .*did you mean 'hierarchical'",
    ),
    "no name": (("volume", "mixtral-8x7b", "--nodes", "4", "--layout", "8"), r"layout '8' must look like name=value"),
    "twice": (("volume", "mixtral-8x7b", "--nodes", "4", "--layout", "tp=2,tp=4"), r"layout says tp twice"),
    "wrong unit": (
        ("time", "mixtral-8x7b", "--cluster", "mine.toml", "--nodes", "4", "--layout", "tp=2"),
        r"inter\.bytes_per_s='400 GHz' has the unit 'GHz'.*write '450 GB/s'",
    ),
    "unknown model": (
        ("explain", "gpt5-moe"),
        r"unknown model 'gpt5-moe'; available: .*did you mean 'gpt4-moe'",
    ),
    "unknown cluster": (("explain", "--cluster", "dgx-h1000"), r"unknown cluster 'dgx-h1000'.*did you mean 'dgx-h100'"),
    "not a transformer": (
        ("memory", "resnet.json", "--nodes", "1", "--layout", "tp=1"),
        r"config\.json is not of a transformer we know \(model_type='resnet'\)",
    ),
    "not JSON": (("memory", "broken.json", "--nodes", "1", "--layout", "tp=1"), r"broken\.json is not JSON"),
    "no such file": (("memory", "missing.json", "--nodes", "1", "--layout", "tp=1"), r"cannot read missing\.json"),
    "negative batch": (
        ("time", "mixtral-8x7b", "--nodes", "4", "--batch", "-8", "--layout", "tp=2"),
        r"query\.global_batch=-8 must be at least 1; nearest legal: 1",
    ),
    "batch that does not divide": (
        ("time", "mixtral-8x7b", "--nodes", "4", "--batch", "100", "--layout", "tp=1"),
        r"global_batch=100 must be a multiple of .*=32; nearest legal: 96",
    ),
    "no devices": (("time", "mixtral-8x7b", "--layout", "tp=2"), r"query\.nodes=0 .* nearest legal: nodes=1"),
    "negative nodes": (("time", "mixtral-8x7b", "--nodes", "-1", "--layout", "tp=2"), r"query\.nodes=-1 must be at"),
    "uneven nodes": (("time", "mixtral-8x7b", "--devices", "12", "--layout", "tp=2"), r"nearest legal: 8"),
    "unknown framework": (
        ("time", "mixtral-8x7b", "--nodes", "4", "--framework", "megatron", "--layout", "tp=2"),
        r"query\.framework='megatron' must be one of: .*megatron-core",
    ),
    "skew below 1": (("time", "mixtral-8x7b", "--nodes", "4", "--skew", "0.5", "--layout", "tp=2"), r"skew=0\.5 must"),
    "precision of another device": (
        ("memory", "mixtral-8x7b", "--cluster", "dgx-a100", "--nodes", "1", "--layout", "precision=fp8"),
        r"precision='fp8' is not one A100-SXM-80GB computes in: fp32, fp16, bf16; nearest legal: bf16",
    ),
    "precision before bf16": (
        ("time", "mixtral-8x7b", "--cluster", "dgx2-v100", "--nodes", "1", "--layout", "precision=bf16"),
        r"precision='bf16' is not one V100-SXM3-32GB computes in: fp32, fp16; nearest legal: fp16",
    ),
    "no pipeline to fill": (
        ("time", "mixtral-8x7b", "--nodes", "4", "--layout", "schedule=zero_bubble"),
        r"schedule='zero_bubble' is of a pipeline, .* nearest legal: '1f1b', or pp=2",
    ),
    "too few micro-batches": (
        ("volume", "mixtral-8x7b", "--nodes", "4", "--batch", "8", "--layout", "tp=4,pp=4,schedule=dualpipe"),
        r"needs at least 8 micro-batches, and global_batch=8 has 4 of .*=2 sequences; nearest legal: global_batch=16",
    ),
    "not whole rounds": (
        ("time", "mixtral-8x7b", "--nodes", "4", "--batch", "12", "--layout", "tp=4,pp=4,vp=2"),
        r"'interleaved' of pp=4 stages needs a multiple of 4 micro-batches, .* has 6 .* nearest legal: global_batch=16",
    ),
    "skew and capacity": (
        ("volume", *LAYOUT, "--skew", "1.5", "--capacity-factor", "1.25"),
        r"capacity_factor=1\.25 pads .* nearest legal: skew=1",
    ),
    "negative capacity": (
        ("time", *LAYOUT, "--capacity-factor", "-1"),
        r"query\.capacity_factor=-1\.0 must be at least 0",
    ),
    "fewer than no blocks": (("time", *LAYOUT, "--mtp-layers", "-2"), r"query\.mtp_layers=-2 must be at least -1"),
    "capacity of merged rows": (
        ("time", *LAYOUT[:-1], "ep=4,alltoall=node_dedup", "--capacity-factor", "1.5"),
        r"capacity_factor=1\.5 pads rows per expert, .* nearest legal: 1\.0",
    ),
    "skew of a dense model": (
        ("time", "llama3-8b", "--nodes", "1", "--layout", "tp=8", "--skew", "1.2"),
        r"query\.skew=1\.2 is of experts, and the model has none",
    ),
    "layer without a trace": (("memory", *LAYOUT, "--layer", "2"), r"--layer 2 is of a trace; give --trace RUN"),
    "negative price": (
        ("time", *LAYOUT, "--usd-per-device-hour", "-2"),
        r"bill\.usd_per_device_hour=-2\.0 must be at least 0",
    ),
    "dense to explain": (("explain", "llama3-8b"), r"has no experts to explain; try 'gpt4-moe'"),
    "cases not JSON": (("predict", "--cases", "broken.json"), r"broken\.json is not JSON"),
    "cases without rows": (("predict", "--cases", "resnet.json"), r"resnet\.json has no list `rows`"),
    "cases missing": (("validate", "--cases", "missing.json"), r"cannot read missing\.json"),
    "models of cases": (("validate", "--cases", "models.json"), r"models=\[3\] must be an object"),
    "no layout fits": (
        ("time", "llama3.1-405b", "--nodes", "1", "--batch", "8"),
        r"none of \d+ layouts fits 8 x H100-SXM-80GB: .* give more devices, or a --layout",
    ),
    "unknown rank": (("search", "tiny", "--devices", "1", "--rank", "speed"), r"rank='speed' must be one of: time"),
    "nodes to try": (("search", "tiny", "--try-nodes", "8,many"), r"--try-nodes '8,many' must be whole numbers"),
    "dimensions": (("memory", "dims.toml", "--nodes", "1"), r"unknown field 'model\.layers'.*did you mean"),
    "unknown verb": (("volumes",), r"No such command 'volumes'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_one_clear_error(case: str, plan: Turnout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, pattern = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(CLUSTER)
    Path("resnet.json").write_text('{"model_type": "resnet", "depths": [3, 4, 6, 3]}')
    Path("dims.toml").write_text("layers = 4")
    Path("broken.json").write_text("{")
    Path("models.json").write_text('{"rows": [], "models": [3]}')
    result = plan(*args)
    assert (result.code, result.out) == (2, ""), result
    assert "Traceback" not in result.err
    words = " ".join(result.err.split())
    assert re.search(pattern, words), words


# --- the whole ---


def test_every_named_model_has_a_source() -> None:
    assert set(SOURCES) == set(SHAPES.names())


def test_verbs_reach_neither_torch_nor_numpy() -> None:
    asked = [ANSWERS[verb][0] for verb in ("volume", "memory", "time", "explain", "models", "clusters")]
    code = f"""
import sys
from turnout.cli.main import main
for args in {asked!r}:
    sys.argv = ["turnout", "plan", *args, "--json"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, args
    loaded = {{"torch", "numpy", "matplotlib"}} & set(sys.modules)
    assert not loaded, (args, loaded)
print("all")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all\n")


def test_import_and_a_query_take_less_than_a_third_of_a_second(tmp_path: Path) -> None:
    """Of the processor: tests run beside others. Byte code is there, as after an installation."""
    code = """
import time, turnout
from turnout.plan.layout import layout_of
from turnout.plan.time import step_time
query = turnout.plan.Query(model="deepseek-v3", cluster="h800", nodes=256, global_batch=15360,
                           strategy=layout_of("pp=16,ep=64,folded=true,alltoall=node_dedup"))
step_time(query.job(), query.machine)
print(time.process_time())
"""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    outputs = [subprocess.check_output([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert float(outputs[-1]) < 0.3
