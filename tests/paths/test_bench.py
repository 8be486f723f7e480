"""Benchmarks: fair turns, numbers that are there or null, and a failing child that says why."""

import json
import math
import time

import pytest
import torch

from turnout.bench import train_step
from turnout.bench.measure import peak_mib, race
from turnout.errors import ConfigError, TurnoutError
from turnout.models import Decoder
from turnout.train.recipes import load_recipe
from turnout.train.step import StepResult


def test_a_race_runs_everybody_once_a_round_and_lets_the_order_turn() -> None:
    order: list[str] = []
    contestants = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    timings = race(contestants, rounds=3, warmup=1)
    assert order == [*"abc", *"bca", *"cab", *"abc"]
    assert all(0 <= t.ms_min <= t.ms_median <= t.ms_max for t in timings.values())


def test_a_race_measures_time() -> None:
    timings = race({"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.05)}, rounds=3, warmup=0)
    assert timings["short"].ms_min >= 10
    assert timings["long"].ms_min >= 50
    assert timings["short"].ms_median < timings["long"].ms_median


def test_a_case_gives_a_row_a_peer_and_null_for_what_was_not_measured(turnout) -> None:
    peers = "turnout,gemm-limit"
    result = turnout(
        "bench", "train-step", "--recipe", "smoke", "--rounds", "1", "--warmup", "0", "--peers", peers, "--json"
    )
    assert result.code == 0, result.err
    rows = {row["peer"]: row for row in json.loads(result.out.splitlines()[-1], parse_constant=pytest.fail)["rows"]}
    ours, limit = rows["turnout"], rows["gemm-limit"]
    assert ours["speedup_of_turnout"] == 1.0
    assert ours["ratio_to_dense"] is None
    assert limit["peak_mib"] is None
    assert ours["peak_mib"] > 50
    assert ours["ratio_to_limit"] == pytest.approx(limit["ms_median"] / ours["ms_median"])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_our_contestant_is_the_training_loops_own_step(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = load_recipe("smoke", [f"optimizer.clip={clip}"])
    model = Decoder(smoke.model)
    monkeypatch.setattr(train_step, "Decoder", lambda _: model)
    step = train_step.contestant("turnout", smoke, smoke)
    before = model.embedding_VD.detach().clone()
    result = step()
    assert isinstance(result, StepResult)
    assert math.isfinite(result.loss)
    assert result.grad_norm > 0
    assert not torch.equal(model.embedding_VD, before)


def test_a_recipe_that_mixtral_cannot_be_is_refused() -> None:
    recipe = load_recipe("smoke", ["model.moe.shared_hidden=16"])
    with pytest.raises(ConfigError, match="no shared expert"):
        train_step.contestant("transformers-eager", recipe, recipe)


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(TurnoutError, match="exit code 1: ZeroDivisionError"):
        peak_mib(_fail)


def _fail() -> None:
    raise ZeroDivisionError("on purpose")
