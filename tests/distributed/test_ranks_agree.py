"""Ranks decide alike: a refusal, a stop, a resume happens on all of them or on none."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.agreements import SLOWER, STOPPED_AT
from turnout.observe.metrics import read_metrics

REFUSALS = {
    "a second writer": r"ConfigError: .*/agreed is being written by another process, \d+; wait for its end",
    "written over": r"ConfigError: .*/agreed already holds a run or its recipe \(metrics\.jsonl\)",
    "another seed": r"ConfigError: seed=3 cannot take the place of 0, with which the run began",
    "two recipes": r"ConfigError: rank 1 has another recipe than rank 0 \(lr = 0\.002\)",
    "two texts": r"ConfigError: rank 1 has another text than rank 0 \(elsewhere",
    "one fails": r"DataError: rank 1 has no text",
    "second derivatives": r"ConfigError: create_graph=True: the layers have no second derivatives",
}


@pytest.fixture(scope="module")
def found(four_ranks: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return [torch.load(four_ranks / f"rank-{rank}.pt")["agreements"] for rank in range(2)]


@pytest.mark.parametrize("cause", REFUSALS)
def test_what_one_rank_must_refuse_all_refuse_in_the_same_words(cause: str, found: list[dict[str, Any]]) -> None:
    assert re.match(REFUSALS[cause], found[0][cause]), found[0][cause]
    assert found[1][cause] == found[0][cause]


def test_a_signal_to_one_rank_stops_all_at_one_step_with_its_number(found: list[dict[str, Any]]) -> None:
    for outcome in found:
        assert outcome["stopped"] == {"outcome": "stopped", "by": signal.SIGTERM, "step": STOPPED_AT}


def test_all_ranks_go_on_with_the_settings_that_changed(found: list[dict[str, Any]], four_ranks: Path) -> None:
    for outcome in found:
        assert outcome["resumed"]["step"] == STOPPED_AT
        assert max(outcome["resumed"]["lr"]) == SLOWER
    said = [line["text"] for line in read_metrics(four_ranks / "agreed").events]
    assert f"resumed with optimizer.lr={SLOWER} (before: 0.002)" in said
    assert "resumed with strategy.ep=1 (before: 2)" in said


def test_all_ranks_pass_over_a_damaged_checkpoint(found: list[dict[str, Any]]) -> None:
    assert [outcome["damaged"]["step"] for outcome in found] == [STOPPED_AT, STOPPED_AT]
    for outcome in found:
        assert re.match(r"passed over step-3: .*model\.00001\.safetensors is damaged", outcome["damaged"]["said"][0])


def test_all_ranks_say_whose_disk_was_full_and_what_is_intact(found: list[dict[str, Any]]) -> None:
    for outcome in found:
        full = outcome["full disk"]
        assert full["saved"] is None
        assert full["left"] == ["latest", f"step-{STOPPED_AT}"]
        assert re.match(
            r"rank 1: cannot save .*step-3: No space left on device \(errno 28, at .*model\.00001\.safetensors\); "
            rf"step-{STOPPED_AT} is untouched and still the latest\. Free disk space",
            full["said"],
        )
