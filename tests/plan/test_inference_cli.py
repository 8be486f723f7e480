"""`turnout plan inference`: JSON last with the promised keys, tables for people, one clear error for bad use."""

import csv
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Turnout

ASKED = ("mixtral-8x7b", "--devices", "8", "--batch", "32", "--layout", "ep=8")


@pytest.fixture
def plan(turnout: Turnout) -> Turnout:
    """`turnout plan inference`."""
    return partial(turnout, "plan", "inference")


def last(out: str) -> dict[str, Any]:
    (line,) = out.splitlines()
    return json.loads(line)


def test_a_deployment_is_answered(plan: Turnout) -> None:
    code, out, err = plan(*ASKED, "--usd-per-device-hour", "2", "--json")
    assert code == 0, err
    answer = last(out)
    assert {"ttft_s", "tpot_s", "request_s", "prefill_tokens_per_s", "experts_touched", "layout"} <= answer.keys()
    assert answer["request_s"] == pytest.approx(answer["ttft_s"] + 255 * answer["tpot_s"])
    assert answer["decode_tokens_per_s"] == pytest.approx(32 / answer["tpot_s"])
    assert answer["decode_tokens_per_s_per_device"] == pytest.approx(answer["decode_tokens_per_s"] / 8)
    assert answer["usd_per_million_tokens"] == pytest.approx(16 / 3600 / answer["served_tokens_per_s"] * 1e6)
    assert answer["fits"]
    assert 0 < answer["bandwidth_share"] < 1


def test_people_read_parts_and_what_bounds_them(plan: Turnout, tmp_path: Path) -> None:
    code, out, err = plan(*ASKED, "--csv", str(tmp_path / "parts.csv"))
    assert (code, err) == (0, "")
    for words in (
        "first token",
        "exposed all-to-all",
        "at the data sheet's bandwidth",
        "of 8 experts of a layer",
        "fits:",
    ):
        assert words in out
    rows = list(csv.DictReader((tmp_path / "parts.csv").open()))
    assert [row["part"] for row in rows] == ["products", "experts", "attention", "tp", "ep", "host"]


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_a_goal_is_searched(plan: Turnout, goal: str) -> None:
    code, out, err = plan(*ASKED[:3], "--goal", goal, "--limit-ms", "20", "--top", "3", "--json")
    assert code == 0, err
    answer = last(out)
    assert len(answer["best"]) == 3
    assert all(row["tpot_s"] <= 0.02 for row in answer["best"])
    assert answer["fitting"] <= answer["considered"]
    key, sign = ("tpot_s", 1) if goal == "latency" else ("decode_tokens_per_s_per_device", -1)
    assert [row[key] for row in answer["best"]] == sorted((row[key] for row in answer["best"]), key=lambda x: sign * x)


def test_what_a_layout_says_is_kept_by_the_search(plan: Turnout) -> None:
    code, out, err = plan(*ASKED, "--goal", "latency", "--json")
    assert code == 0, err
    assert all("ep=8" in row["layout"] for row in last(out)["best"])


def test_nothing_to_find_is_an_exit_code_of_1(plan: Turnout) -> None:
    code, out, _ = plan("mixtral-8x7b", "--devices", "1")
    assert code == 1
    assert re.search(r"none fits 74\.5 GiB; the least needs \d+\.\d GiB", out)
    code, out, _ = plan(*ASKED[:3], "--limit-ms", "0.1")
    assert code == 1
    assert "none takes at most 100 us a token" in out


def test_offload_makes_one_device_enough(plan: Turnout) -> None:
    code, out, err = plan(
        "mixtral-8x7b", "--devices", "1", "--layout", "tp=1", "--cached-experts", "4", "--hit-rate", "0.8", "--json"
    )
    assert code == 0, err
    answer = last(out)
    assert answer["fits"]
    assert answer["decode"]["host_s"] > answer["decode"]["experts_s"]


def test_published_figures_are_printed_with_their_errors(plan: Turnout) -> None:
    code, out, err = plan("--published", "--json")
    assert code == 0, err
    answer = last(out)
    assert {"id", "value", "predicted", "error", "holds", "source", "assumed"} <= answer["rows"][0].keys()
    assert answer["n"] == sum(row["error"] is not None and row["measured"] for row in answer["rows"])
    assert "deepspeed-1t" in err
    assert "mean error of 6 measured figures" in err


BAD = {
    "no model": ((), r"give a MODEL"),
    "unknown model": (("mixtrel", "--devices", "8"), r"unknown model 'mixtrel'"),
    "no devices": (("mixtral-8x7b", "--layout", "ep=8"), r"one must say how many"),
    "pipeline": ((*ASKED[:3], "--layout", "pp=2"), r"strategy\.pp=2 is not planned for inference"),
    "experts": ((*ASKED[:3], "--layout", "ep=3"), r"strategy\.ep=3 must divide num_experts=8"),
    "decided": ((*ASKED[:3], "--layout", "ep=3", "--goal", "latency"), r"strategy\.ep=3 must divide num_experts=8"),
    "goal": ((*ASKED[:3], "--goal", "speed"), r"goal='speed' must be one of: latency, throughput"),
    "precision": (
        ("mixtral-8x7b", "--cluster", "dgx-a100", "--devices", "8", "--layout", "ep=8,precision=fp8"),
        r"precision='fp8' is not one A100",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_one_clear_error(case: str, plan: Turnout) -> None:
    args, pattern = BAD[case]
    code, out, err = plan(*args)
    assert (code, out) == (2, ""), (out, err)
    assert "Traceback" not in err
    assert re.search(pattern, " ".join(err.split())), err
