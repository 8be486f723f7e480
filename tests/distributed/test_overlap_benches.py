"""`turnout bench overlap` and `turnout bench tuner`: what they refuse, what they make of times, small runs of each."""

import json
from collections.abc import Callable

import pytest

from turnout.bench import overlap, schedule
from turnout.bench.lab import Links, why_not
from turnout.bench.overlap_case import OverlapCase
from turnout.bench.schedule_case import ScheduleCase
from turnout.errors import ConfigError
from turnout.tune import Dictionary

SMALL = OverlapCase(hosts=1, ranks=2, tokens=48, dim=16, hidden=8, experts=4, chunks=(1, 2), rounds=2, warmup=1)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: OverlapCase(hosts=1, ranks=1), "hosts=1 times ranks=1 must be at least 2"),
        (lambda: OverlapCase(experts=3), "experts=3 must be a multiple of the 2 ranks; nearest legal: 4"),
        (lambda: OverlapCase(k=9), "k=9 must be at most the 8 experts"),
        (lambda: OverlapCase(chunks=(1, 3)), r"chunks=\(1, 3\) must be some of 1, 2, 4, 8"),
        (lambda: OverlapCase(chunks=(2, 4)), r"chunks=\(2, 4\) must have 1 among them"),
        (lambda: OverlapCase(modes=()), r"modes=\(\) must be some of forward, train"),
        (lambda: OverlapCase(tokens=0), "tokens=0 must be at least 1"),
        (lambda: ScheduleCase(levels=1), "levels=1 must be at least 2"),
        (lambda: ScheduleCase(swing=1.0), r"swing=1\.0 must be above 1"),
        (lambda: ScheduleCase(etp=3), "etp=3 must divide the 4 ranks"),
        (lambda: ScheduleCase(hold=0), "hold=0 must be at least 1"),
        (lambda: ScheduleCase(then_mbit=5), r"then_mbit=5 must be above 0, and so must the rate of the lab's links"),
    ],
)
def test_what_cannot_be_measured_is_refused(made: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made()


def test_cases_survive_json() -> None:
    links = Links(rate_mbit=400, delay_ms=5)
    for case in (OverlapCase(lab=True, links=links, chunks=(1, 8)), ScheduleCase(links=links, levels=3)):
        assert type(case).from_json(json.loads(json.dumps(case.to_json()))) == case


def test_a_schedule_swings_as_the_paper_says_and_holds_every_level() -> None:
    case = ScheduleCase(least=1000, levels=3, hold=2)
    assert case.period() == (0, 0, 1, 1, 2, 2, 1, 1)
    assert max(case.tokens) / min(case.tokens) == pytest.approx(4.38, rel=1e-3)
    # k of each of 4 ranks' tokens, over 4 experts
    assert case.tokens[0] * 4 * case.k / case.experts == 1000


def test_a_step_is_held_against_the_longer_of_its_parts_in_chunks_and_uncut() -> None:
    case = OverlapCase(chunks=(1, 4), modes=("train",), rounds=2)
    seconds = {"train 1 step": [0.3, 0.3], "train 1 exchanges": [0.2, 0.2], "train 1 experts": [0.1, 0.1]}
    seconds |= {"train 4 step": [0.22, 0.22], "train 4 exchanges": [0.21, 0.21], "train 4 experts": [0.12, 0.12]}
    rows = overlap._rows("train", case, seconds)
    uncut, cut = (row for row in rows if row["peer"] == "step")
    assert uncut["step_over_longer"] == pytest.approx(1.5)
    assert cut["step_over_longer"] == pytest.approx(22 / 21)
    assert cut["step_over_longer_uncut"] == pytest.approx(1.1)
    assert cut["sum_over_step"] == pytest.approx(1.5)
    assert cut["speedup_over_uncut"] == pytest.approx(30 / 22)
    best = overlap._best("train", rows)
    assert (best["chunks"], best["longer"]) == (4, "exchanges")
    assert best["uncut_sum_over_longer"] == pytest.approx(1.5)


def test_totals_are_those_of_the_best_of_each_level_and_of_everybody_everywhere() -> None:
    times = {0: {"a": 1.0, "b": 2.0}, 1: {"a": 5.0, "b": 3.0}}
    steps = [
        {"level": level, "taken": taken, "seconds": {**times[level], "tuner": times[level][taken] + held_up}}
        for level, taken, held_up in ((0, "a", 0.0), (1, "a", 0.0), (1, "b", 0.0), (0, "a", 0.5))
    ]
    totals = schedule.totals_of(steps, measured=True)
    assert (totals.tuner, totals.oracle, dict(totals.static)) == (10.5, 8.0, {"a": 12.0, "b": 10.0})
    by_median = schedule.totals_of(steps, measured=False)
    assert (by_median.tuner, by_median.oracle) == (10.0, 8.0)
    assert by_median.ratios()["tuner_over_oracle"] == 1.25
    assert by_median.ratios()["worst_static_over_tuner"] == 1.2


@pytest.mark.slow
def test_the_tuner_chooses_among_chunks_and_says_why() -> None:
    result = overlap.run(OverlapCase(**(vars(SMALL) | {"tune": True})))
    peers = {(row["peer"], row["mode"], row["chunks"]) for row in result["rows"]}
    assert peers == {(part, mode, d) for part in overlap.PARTS for mode in ("forward", "train") for d in (1, 2)}
    assert all(0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"] for row in result["rows"])
    found = result["tuner"]
    assert found["choice"] in [each["strategy"] for each in found["candidates"]]
    assert sum(each["reason"].startswith("taken: ") for each in found["candidates"]) == 1


@pytest.mark.slow
def test_the_tuner_runs_a_schedule_on_ranks_and_leaves_its_dictionary(tmp_path) -> None:  # type: ignore[no-untyped-def]
    lab = not why_not()
    sizes = {"dim": 16, "hidden": 8, "least": 256, "levels": 2, "hold": 1, "periods": 1, "most_steps": 200, "trials": 1}
    result = schedule.run(
        ScheduleCase(lab=lab, links=Links(rate_mbit=400 if lab else 0), **sizes), tmp_path / "it.json"
    )
    assert {row["peer"] for row in result["rows"]} >= {"tuner", "r=0 d=1 flat", "r=1 d=8 flat", "r=2 d=2 rank_dedup"}
    assert result["by_medians"]["tuner_over_oracle"] >= 1.0
    assert result["learning"]["warm"]
    found = Dictionary.from_json((tmp_path / "it.json").read_text(encoding="utf-8"), "it")
    assert len(found.entries) == len(result["decisions"]) > 1
    assert all(each["reason"].startswith("taken: ") for each in result["decisions"])
