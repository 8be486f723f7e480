"""The recorder: one line per record, nothing twice after a resume, nothing lost but the last second."""

import json
import math
import os
import statistics
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turnout.data.prepare import Dataset
from turnout.data.sampler import Batch
from turnout.errors import ConfigError, ShapeError
from turnout.layers import stats as layer_stats
from turnout.models import Decoder
from turnout.observe.balance import balance
from turnout.observe.metrics import read_metrics
from turnout.observe.recorder import Recorder
from turnout.observe.report import write_report
from turnout.observe.snapshot import take_snapshot
from turnout.observe.trace import TRACE_NAME, read_trace
from turnout.tensors import MoEStats
from turnout.train.estimate import step_on
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.signals import StopRequest

LAYERS, EXPERTS = ("a", "b"), (4, 6)
DAMAGED_HEADERS = [
    b"[" * 100_000,
    b"null",
    b'{"layers":[],"num_experts":[]}',
    b'{"layers":["a"],"num_experts":[-4]}',
    b'{"layers":["a"],"num_experts":[0]}',
    b'{"layers":["a"],"num_experts":[1e400]}',
    b'{"layers":["a"],"num_experts":[1' + b"0" * 400 + b"]}",
    b'{"layers":["a"],"num_experts":[4,4]}',
]


def stats(
    counts: list[int], dropped: list[int] | None = None, entropy: float = 0.5, declined: list[int] | None = None
) -> MoEStats:
    """What a layer of top-1 routing reports for these counts."""
    total = sum(counts)
    return MoEStats(
        assigned_E=torch.tensor(counts),
        dropped_capacity_E=torch.tensor(dropped or [0] * len(counts)),
        dropped_policy_E=torch.tensor(declined or [0] * len(counts)),
        num_routed=torch.tensor(total),
        num_padding=torch.tensor(0),
        entropy_sum=torch.tensor(total * entropy * math.log(len(counts))),
        margin_sum=torch.tensor(total * 0.25),
    )


def record_steps(recorder: Recorder, steps: range) -> None:
    """Steps, evaluations and events as a training would write them; the same for the same steps."""
    for step in steps:
        counts = [[10 + step, 10, 10, 10], [5, 5, 5, 5, step, 0]]
        recorder.step(
            step,
            seconds=0.4 * step,
            tokens=64 * step,
            loss=3.0 - 0.01 * step,
            total_loss=3.1,
            lr=1e-3,
            grad_norm=1.5,
            tokens_per_s=160.0,
            aux={"load_balance": 1.25},
            stats=[stats(layer) for layer in counts],
        )
        if step % 5 == 0:
            recorder.eval(step, seconds=0.4 * step, tokens=64 * step, val_loss=2.9)
            recorder.event(step, "saved")
            recorder.token_view(step, ["to", "ken"], [[[0], [1]]] * 2, [[[1.0], [0.5]]] * 2)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_step_is_one_line_and_one_trace_record(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run", LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(1, 4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["aux"] == {"load_balance": 1.25}
    assert lines[0]["dead_experts"] == 1
    assert lines[0]["margin"] == pytest.approx(0.25)
    assert lines[0]["router_entropy"] == pytest.approx(0.5)
    trace = read_trace(tmp_path / "run")
    assert trace.layers == LAYERS
    assert trace.steps.tolist() == [1, 2, 3]
    assert trace.counts[0].tolist() == [[11, 10, 10, 10], [12, 10, 10, 10], [13, 10, 10, 10]]
    assert trace.counts[1].tolist()[2] == [5, 5, 5, 5, 3, 0]
    assert int(trace.dropped[1].sum()) == 0


def test_a_resumed_run_leaves_the_same_files_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with Recorder(whole, LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(1, 21))
    with Recorder(broken, LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(1, 18))
    with (broken / "metrics.jsonl").open("ab") as lines, (broken / TRACE_NAME).open("ab") as trace:
        lines.write(b'{"kind":"step","step":18,"lo')
        trace.write(b"torn")
    with Recorder.resume(broken, 12, LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(13, 21))
    assert contents(broken) == contents(whole)


def test_resuming_without_a_record_begins_one(tmp_path: Path) -> None:
    with Recorder.resume(tmp_path / "run", 3, LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(4, 6))
    assert read_trace(tmp_path / "run").steps.tolist() == [4, 5]


def test_a_run_is_never_begun_over_another(tmp_path: Path) -> None:
    Recorder(tmp_path, LAYERS, EXPERTS).close()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        Recorder(tmp_path, LAYERS, EXPERTS)


def test_resuming_with_other_layers_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path, LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(1, 9))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a: 4 experts, b: 6 experts; the model has a: 4 experts, b: 8"):
        Recorder.resume(tmp_path, 4, LAYERS, (4, 8))
    assert contents(tmp_path) == before


def test_every_leaves_steps_out_of_both_files(tmp_path: Path) -> None:
    with Recorder(tmp_path, LAYERS, EXPERTS, every=4) as recorder:
        record_steps(recorder, range(1, 10))
    assert [line["step"] for line in read_metrics(tmp_path).steps] == [4, 8]
    assert read_trace(tmp_path).steps.tolist() == [4, 8]
    with pytest.raises(ConfigError, match="every=0 must be at least 1"):
        Recorder(tmp_path / "other", LAYERS, EXPERTS, every=0)


def test_lines_are_on_disk_within_a_second_of_training(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, LAYERS, EXPERTS)
    record_steps(recorder, range(1, 5))
    assert [line["step"] for line in read_metrics(tmp_path).steps] in ([1, 2, 3], [1, 2, 3, 4])
    assert len(read_trace(tmp_path).steps) >= 3
    recorder.close()
    recorder.close()


def test_numbers_that_are_not_finite_are_null_and_read_back_as_missing(tmp_path: Path) -> None:
    with Recorder(tmp_path, (), ()) as recorder:
        recorder.step(
            1,
            seconds=0.1,
            tokens=1,
            loss=math.nan,
            total_loss=math.inf,
            lr=1.0,
            grad_norm=-math.inf,
            tokens_per_s=math.nan,
        )
    (line,) = read_metrics(tmp_path).steps
    assert line["loss"] is line["total_loss"] is line["grad_norm"] is None
    assert "cv" not in line
    assert not (tmp_path / "trace").exists()


def test_a_layer_without_tokens_is_passed_over(tmp_path: Path) -> None:
    got = balance(take_snapshot([stats([0, 0]), stats([3, 1])], [2, 2]))
    assert got.max_violation == pytest.approx(0.5)
    assert got.dropped_share == 0
    empty = balance(take_snapshot([stats([0, 0])], [2]))
    assert math.isnan(empty.max_violation)
    assert math.isnan(empty.dropped_share)
    assert empty.dead_experts == 0


@pytest.mark.parametrize("number", [0, 1, 3])
def test_statistics_that_are_no_whole_micro_batches_are_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(ShapeError, match="one per layer, for each micro-batch in turn"):
        take_snapshot([stats([1, 2])] * number, [2, 2])


def test_statistics_of_another_expert_count_are_refused() -> None:
    with pytest.raises(ShapeError, match="statistics of layer 1 count 3 experts; the recorder expects 2"):
        take_snapshot([stats([1, 2]), stats([1, 2, 3])], [2, 2])


def test_even_load_and_one_expert_taking_all_are_the_ends_of_every_scale() -> None:
    even = balance(take_snapshot([stats([7] * 4)], [4]))
    assert (even.max_violation, even.cv, even.dead_experts) == (0, 0, 0)
    assert even.entropy == pytest.approx(1)
    all_on_one = balance(take_snapshot([stats([0, 0, 28, 0], [0, 0, 14, 0])], [4]))
    assert all_on_one.max_violation == pytest.approx(3)
    assert all_on_one.entropy == pytest.approx(0)
    assert all_on_one.dead_experts == 3
    assert all_on_one.dropped_share == pytest.approx(0.5)


def test_what_a_router_leaves_out_by_design_is_not_dropped(tmp_path: Path) -> None:
    layer = stats([8, 8], dropped=[2, 0], declined=[0, 8])
    got = balance(take_snapshot([layer], [2]))
    assert (got.dropped_share, got.declined_share) == (pytest.approx(1 / 8), pytest.approx(1 / 2))
    with Recorder(tmp_path, ["a"], [2]) as recorder:
        recorder.step(1, seconds=1, tokens=1, loss=1, total_loss=1, lr=1, grad_norm=1, tokens_per_s=1, stats=[layer])
    assert read_trace(tmp_path).dropped[0].tolist() == [[2, 0]]


def test_a_training_counts_the_micro_batches_of_a_step_together_and_the_report_says_so(
    with_loop: Callable[..., Recipe], small_dataset: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer(with_loop(steps=3, accumulate=4, eval_every=0), small_dataset, tmp_path)
    trainer.train(StopRequest())
    trainer.finish()
    trace, lines = read_trace(tmp_path), read_metrics(tmp_path).steps
    for row, line in enumerate(lines):
        whole = [counts[row].max() * len(counts[row]) / counts[row].sum() - 1 for counts in trace.counts]
        assert line["max_violation"] == line["max_violation_global"] == pytest.approx(np.mean(whole), rel=1e-5)
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Counted over the whole step, all its micro-batches together." in page
    assert "in each micro-batch" not in page


counts_of = st.lists(st.integers(0, 2**40), min_size=3, max_size=3).filter(lambda counts: sum(counts) > 0)


@given(batches=st.lists(st.tuples(counts_of, counts_of), min_size=1, max_size=4))
def test_balance_equals_the_plain_definitions(batches: list[tuple[list[int], list[int]]]) -> None:
    got = balance(take_snapshot([stats(layer) for batch in batches for layer in batch], [3, 3]))
    u = np.array(batches, dtype=float) * 3 / np.array(batches, dtype=float).sum(axis=2, keepdims=True)
    assert got.max_violation == pytest.approx((u.max(axis=2) - 1).mean())
    assert got.max_violation_worst == pytest.approx(u.max() - 1)
    assert got.cv == pytest.approx(u.std(axis=2).mean())
    whole = np.array(batches, dtype=float).sum(axis=0)
    assert got.max_violation_global == pytest.approx((whole.max(axis=1) * 3 / whole.sum(axis=1) - 1).mean())
    assert -1e-9 <= got.entropy_worst <= got.entropy <= 1 + 1e-9


def test_counts_past_single_precision_stay_exact() -> None:
    snapshot = take_snapshot([stats([2**31 + 1, 2**24 + 1])], [2])
    assert snapshot.assigned.tolist() == [[2**31 + 1, 2**24 + 1]]


@pytest.mark.parametrize("cut", [1, 50, 87])
def test_a_torn_last_record_is_not_read(tmp_path: Path, cut: int) -> None:
    with Recorder(tmp_path, LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(1, 5))
    path = tmp_path / TRACE_NAME
    os.truncate(path, path.stat().st_size - cut)
    assert read_trace(tmp_path).steps.tolist() == [1, 2, 3]


def test_a_tail_of_zeros_after_a_power_cut_is_not_read(tmp_path: Path) -> None:
    with Recorder(tmp_path, LAYERS, EXPERTS) as recorder:
        record_steps(recorder, range(1, 4))
    with (tmp_path / TRACE_NAME).open("ab") as file:
        file.write(bytes(88 * 2))
    assert read_trace(tmp_path).steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"TURN", "is not a trace"),
        (b"PK\x03\x04" + bytes(40), "is not a trace"),
        (b"TURNOUT\x02" + bytes(40), "format version 2; this release reads version 1"),
        (b"TURNOUT\x01\xff\xff\xff\xff{", "damaged header"),
        (b"TURNOUT\x01\x02\x00\x00\x00{}", "damaged header"),
        *((b"TURNOUT\x01" + struct.pack("<I", len(body)) + body, "damaged header") for body in DAMAGED_HEADERS),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / TRACE_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        read_trace(tmp_path)


def test_a_full_disk_loses_records_says_so_once_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, LAYERS, EXPERTS)
    record_steps(recorder, range(1, 4))
    recorder.flush()
    write = os.write

    def fails_half_way(descriptor: int, part: bytes) -> int:
        write(descriptor, bytes(part)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fails_half_way)
    with warnings.catch_warnings(record=True) as caught:
        record_steps(recorder, range(4, 10))
        recorder.flush()
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2  # the lines and the trace
    assert all("No space left on device; records are lost" in text for text in texts)
    monkeypatch.setattr(os, "write", write)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record_steps(recorder, range(10, 13))
        recorder.close()
    assert [line["step"] for line in read_metrics(tmp_path).steps] == [1, 2, 3, 10, 11, 12]
    assert read_trace(tmp_path).steps.tolist() == [1, 2, 3, 10, 11, 12]


@pytest.mark.exhaustive
def test_recording_costs_under_one_percent_of_a_step_of_tiny_and_its_statistics_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CPU time of this thread, by shares of one and the same step: whatever else the machine does weighs on both alike
    recipe, collect, spent = load_recipe("tiny"), layer_stats.collect_stats, []

    def timed(*args: Any) -> MoEStats:
        started = time.thread_time()
        stats = collect(*args)
        spent.append(time.thread_time() - started)
        return stats

    monkeypatch.setattr(layer_stats, "collect_stats", timed)
    model = Decoder(recipe.model)
    layers = model.moe_blocks()
    tokens_BS = torch.randint(recipe.model.vocab_size, (recipe.loop.batch_size, recipe.loop.seq_len))
    step = step_on(model, [Batch(tokens_BS=tokens_BS, targets_BS=tokens_BS)], recipe, torch.float32)
    shares = []
    with Recorder(
        tmp_path, [name for name, _ in layers], [layer.config.num_experts for _, layer in layers]
    ) as recorder:
        for number in range(1, 6):
            spent.clear()
            started = time.thread_time()
            result = step()
            whole = time.thread_time() - started
            recorder.step(
                number,
                seconds=2.0 * number,  # flushed every time
                tokens=number,
                loss=result.loss,
                total_loss=result.total_loss,
                lr=1e-3,
                grad_norm=result.grad_norm,
                tokens_per_s=1.0,
                aux=result.aux,
                stats=result.stats,
            )
            shares.append(((time.thread_time() - started - whole) / whole, sum(spent) / whole))
    # the first step warms up
    recording, statistics_of_layers = (statistics.median(column) for column in zip(*shares[1:], strict=True))
    print(f"of a step of tiny: recording {recording:.2%}, its statistics {statistics_of_layers:.2%}")
    assert recording < 0.01
    assert statistics_of_layers < 0.02
