"""The tuner is as good as an oracle once it knows a step, says why, and begins anew when times change."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from turnout.cli.main import app_of
from turnout.errors import ConfigError
from turnout.topology import Link
from turnout.tune import (
    Choice,
    Dictionary,
    Entry,
    Hardware,
    Key,
    LayerShape,
    Rules,
    Workload,
    alike,
    candidates,
    choose,
    explain,
    is_warm,
    key_of,
    observed,
    predict,
    predictions,
)

SHAPE = LayerShape(num_experts=2, top_k=1, dim=64, hidden=256, gated=True, ep=2, etp=4)
NEAR = Link(bytes_per_s=1e9, latency_s=2e-5)
BELIEVED = Hardware(name="lab", ranks=8, local=8, flops_per_s=1e11, intra=NEAR, inter=NEAR)
# what the probe got wrong
TRUE = replace(BELIEVED, flops_per_s=7e10, intra=Link(bytes_per_s=6e8, latency_s=4e-5), busy=0.2)
SWING = 4.38  # between the least and the most capacity of one training: Hwang et al. 2022, figure 1
LEAST, PERIOD = 1500.0, 80
Seconds = Callable[[Choice, float], float]
RUN = """
from turnout.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules, "torch was imported"
"""


def capacity(step: int) -> float:
    """Falls and rises by the paper's factor, over and over."""
    phase = abs((step % PERIOD) / (PERIOD / 2) - 1)
    return round(LEAST * SWING**phase)


@cache
def believed(rows: float) -> dict[Choice, float]:
    return predictions(Workload(shape=SHAPE, capacity=rows), BELIEVED)


def world(seed: int, hardware: Hardware = TRUE) -> Seconds:
    """What steps take in truth: the law on other hardware, and every choice with a quirk of its own."""
    draw = random.Random(seed)
    quirk = {choice: draw.uniform(0.85, 1.25) for choice in candidates(SHAPE, BELIEVED)}

    @cache
    def seconds(choice: Choice, rows: float) -> float:
        return quirk[choice] * predict(choice, Workload(shape=SHAPE, capacity=rows), hardware).step_s

    return seconds


def train(
    dictionary: Dictionary, steps: range, seconds: Seconds, noise: random.Random
) -> tuple[Dictionary, list[Choice]]:
    """Steps whose choice is made by what the one before was like, and whose times are noisy and sometimes held up."""
    taken, before = [], capacity(steps.start)
    for step in steps:
        rows = capacity(step)
        choice, known_by = dictionary.choose(key(before), believed(before)), key(before)
        took = seconds(choice, rows) * noise.lognormvariate(0, 0.05) * (3 if noise.random() < 0.02 else 1)
        dictionary = dictionary.observed(known_by, choice, believed(rows), took)
        taken.append(choice)
        before = rows
    return dictionary, taken


def key(rows: float) -> Key:
    return key_of(Workload(shape=SHAPE, capacity=rows), BELIEVED.name)


def total(choices: list[Choice], steps: range, seconds: Seconds) -> float:
    return sum(seconds(choice, capacity(step)) for choice, step in zip(choices, steps, strict=True))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_over_the_papers_swing_the_tuner_is_within_three_percent_of_the_oracle(seed: int) -> None:
    seconds, noise = world(seed), random.Random(100 + seed)
    learning, steps = range(30 * PERIOD), range(30 * PERIOD, 36 * PERIOD)
    dictionary, _ = train(Dictionary(hardware=BELIEVED), learning, seconds, noise)
    _, taken = train(dictionary, steps, seconds, noise)
    every = candidates(SHAPE, BELIEVED)
    best = [min(every, key=lambda choice: seconds(choice, capacity(step))) for step in steps]
    static = sorted(total([choice] * len(steps), steps, seconds) for choice in every)
    found = total(taken, steps, seconds)
    assert len(set(best)) > 1, "one choice that is always the best needs no tuner"
    assert found <= 1.03 * total(best, steps, seconds)
    assert found <= 1.03 * static[0]
    assert 1.2 * found <= static[-1]


def test_a_time_that_stays_off_its_record_begins_the_search_anew_and_one_slow_step_does_not() -> None:
    rules, predicted = Rules(trials=1, patience=3), dict.fromkeys(candidates(SHAPE, BELIEVED)[:3], 1.0)
    entry = Entry()
    for _ in range(3):
        taken = choose(entry, predicted, rules)
        entry = observed(entry, taken, predicted, 2.0 + list(predicted).index(taken) / 10, rules)
    assert is_warm(entry, predicted, rules)
    fastest = choose(entry, predicted, rules)
    assert fastest == next(iter(predicted))
    slow = observed(entry, fastest, predicted, 9.0, rules)
    assert is_warm(slow, predicted, rules)
    assert observed(slow, fastest, predicted, 2.0, rules).off == 0
    for _ in range(2):
        slow = observed(slow, fastest, predicted, 9.0, rules)
    assert slow.searches == 2
    assert not is_warm(slow, predicted, rules)
    assert slow.trials[fastest].ratio == 9.0


def test_after_a_link_has_slowed_down_the_tuner_is_as_good_as_before() -> None:
    slow = replace(TRUE, intra=Link(bytes_per_s=3e7, latency_s=4e-5))
    before, after, noise = world(5), world(5, slow), random.Random(5)
    dictionary, _ = train(Dictionary(hardware=BELIEVED), range(20 * PERIOD), before, noise)
    dictionary, _ = train(dictionary, range(30 * PERIOD), after, noise)
    steps = range(4 * PERIOD)
    _, taken = train(dictionary, steps, after, noise)
    every = candidates(SHAPE, BELIEVED)
    best = [min(every, key=lambda choice: after(choice, capacity(step))) for step in steps]
    assert max(entry.searches for entry in dictionary.entries.values()) > 1
    assert total(taken, steps, after) <= 1.03 * total(best, steps, after)


@given(st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=12), st.integers(0, 99))
def test_every_candidate_near_the_best_predicted_is_measured_and_the_fastest_taken(
    times: list[float], seed: int
) -> None:
    choices = [Choice(adaptive_r=number % 3, overlap=1 + number, alltoall="flat") for number in range(len(times))]
    draw, rules = random.Random(seed), Rules()
    predicted = {choice: draw.uniform(1.0, 2.9) for choice in choices}
    entry, measured = Entry(), dict(zip(choices, times, strict=True))
    for _ in range(len(times) * rules.trials + 1):
        if is_warm(entry, predicted, rules):
            break
        taken = choose(entry, predicted, rules)
        entry = observed(entry, taken, predicted, measured[taken], rules)
    assert is_warm(entry, predicted, rules)
    assert entry.trials.keys() == set(choices)
    assert measured[choose(entry, predicted, rules)] == pytest.approx(min(times))


def test_what_is_predicted_far_behind_the_best_is_never_tried() -> None:
    near, far = Choice(adaptive_r=1, overlap=1, alltoall="flat"), Choice(adaptive_r=0, overlap=1, alltoall="flat")
    predicted, rules, entry = {near: 1.0, far: 3.5}, Rules(), Entry()
    for _ in range(4):
        entry = observed(entry, choose(entry, predicted, rules), predicted, 1.0, rules)
    assert set(entry.trials) == {near}
    (first, second) = explain(entry, rules)
    assert (first.choice, first.reason) == (near, "taken: the fastest measured")
    assert second.reason == "not tried: predicted at 3.50 times the best, behind 1 others"
    assert second.measured_s is None


def test_where_the_processor_moves_the_bytes_chunks_are_not_taken_and_the_reason_is_said() -> None:
    workload = Workload(shape=SHAPE, capacity=1000.0)
    busy = replace(BELIEVED, busy=1.0)
    predicted = predictions(workload, busy)
    assert min(predicted, key=lambda choice: predicted[choice]).overlap == 1
    rules, entry = Rules(), Entry()
    while not is_warm(entry, predicted, rules):
        taken = choose(entry, predicted, rules)
        entry = observed(entry, taken, predicted, predicted[taken], rules)
    rows = explain(entry, rules, busy.busy)
    cut = [row.choice for row in rows if row.choice.overlap > 1 and row.measured_s is not None]
    assert rows[0].choice.overlap == 1
    assert rows[0].choice.adaptive_r == 0 or (cut and "processor is at work in 100%" in rows[0].reason)


def test_chunks_take_the_longer_of_both_and_one_chunk_of_the_shorter() -> None:
    free = replace(BELIEVED, intra=Link(bytes_per_s=1e9), inter=Link(bytes_per_s=1e9))
    workload = Workload(shape=SHAPE, capacity=2000.0)
    one, *more = (predict(Choice(adaptive_r=4, overlap=d, alltoall="flat"), workload, free) for d in (1, 2, 4, 8))
    assert one.step_s == pytest.approx(one.exchange_s + one.compute_s)
    for chunks, each in zip((2, 4, 8), more, strict=True):
        longer, shorter = max(each.exchange_s, each.compute_s), min(each.exchange_s, each.compute_s)
        assert each.step_s == pytest.approx(longer + shorter / chunks)
    stays = predict(Choice(adaptive_r=0, overlap=1, alltoall="flat"), workload, BELIEVED)
    assert stays.exchange_s == 0
    assert stays.weights_s > 0


def test_weights_pay_where_an_expert_has_many_rows_and_rows_where_it_has_few() -> None:
    busy, fast = replace(BELIEVED, busy=1.0), []
    for rows in (100.0, 20_000.0):
        predicted = predictions(Workload(shape=SHAPE, capacity=rows), busy)
        fast.append(min(predicted, key=predicted.__getitem__).adaptive_r)
    assert fast[0] > 1
    assert fast[1] == 0


def test_candidates_are_those_that_differ() -> None:
    def said(shape: LayerShape, local: int) -> set[tuple[int, str]]:
        found = candidates(shape, replace(BELIEVED, local=local))
        return {(choice.adaptive_r, choice.alltoall) for choice in found}

    assert said(SHAPE, 8) == {(0, "flat"), (1, "flat"), (2, "flat"), (4, "flat")}
    alone = replace(SHAPE, ep=1, etp=2)
    assert said(alone, 8) == {(0, "flat"), (2, "flat")}
    spread = replace(SHAPE, num_experts=16, top_k=2, ep=8, etp=1)
    programs = {"flat", "hierarchical", "node_dedup", "rank_dedup"}
    assert said(spread, 4) == {(0, "flat"), *((1, program) for program in programs)}
    assert said(spread, 8) == {(0, "flat"), (1, "flat"), (1, "rank_dedup")}


def test_a_key_is_a_window_of_rows_and_of_skew() -> None:
    def of(rows: float, skew: float = 1.0) -> tuple[int, int]:
        found = key_of(Workload(shape=SHAPE, capacity=rows, skew=skew), "lab")
        return found.capacity, found.skew

    assert [of(rows)[0] for rows in (0.0, 127.9, 128.0, 1000.0)] == [0, 0, 1, 7]
    assert [of(1.0, skew)[1] for skew in (1.0, 1.2, 1.25, 2.0)] == [0, 0, 1, 3]


def test_steps_of_much_other_rows_say_nothing_of_a_key() -> None:
    def rows(one: float, other: float) -> bool:
        return alike(key(one), key(other))

    assert [rows(1000, 1000), rows(100, 200), rows(3000, 3600), rows(3600, 3000)] == [True] * 4
    assert [rows(100, 300), rows(838, 1370), rows(1370, 838), rows(3000, 4000)] == [False] * 4


def test_a_dictionary_survives_its_file() -> None:
    dictionary, _ = train(Dictionary(hardware=BELIEVED, rules=Rules(most=5)), range(100), world(1), random.Random(1))
    text = dictionary.to_json()
    again = Dictionary.from_json(text, "it")
    assert again == dictionary
    assert json.loads(text)["entries"][0]["candidates"][0].keys() >= {"choice", "predicted_s", "measured_s"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "hardware": {}}'])
def test_a_file_that_is_no_dictionary_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.json is no dictionary of strategies .*turnout tune RECIPE"):
        Dictionary.from_json(text, "mine.json")


def test_a_dictionary_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("mine.json has version 2; this turnout reads version 1")):
        Dictionary.from_json('{"version": 2}', "mine.json")


@pytest.mark.parametrize(("name", "value"), [("prune", 1.0), ("keep", 0.5), ("drift", 1.0), ("trials", 0), ("most", 0)])
def test_rules_that_decide_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"rules\.{name}={value} must be"):
        Rules(**{name: value})


def test_explain_prints_what_was_predicted_and_measured_and_why_without_torch(tmp_path: Path) -> None:
    dictionary, _ = train(Dictionary(hardware=BELIEVED), range(300), world(2), random.Random(2))
    file = tmp_path / "strategies.json"
    file.write_text(dictionary.to_json(), encoding="utf-8")
    check = f"import sys; sys.argv = ['turnout', 'tune', '--explain', {str(file)!r}, '--json']\n" + RUN
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(found["keys"]) == len(dictionary.entries)
    for each in found["keys"]:
        taken = [row for row in each["candidates"] if row["reason"].startswith("taken: ")]
        assert [row["strategy"] for row in taken] == [each["choice"]]
        assert all(row["predicted_s"] > 0 for row in each["candidates"])
    assert "GFLOP/s a rank" in result.stderr


@pytest.mark.parametrize("words", [[], ["smoke", "--explain", "x.json"]])
def test_tune_wants_one_thing_to_do(words: list[str]) -> None:
    result = CliRunner().invoke(app_of(["tune"]), ["tune", *words])
    assert isinstance(result.exception, ConfigError)
    assert "a recipe to measure, or --explain FILE" in str(result.exception)
