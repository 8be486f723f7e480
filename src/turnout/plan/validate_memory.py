"""Errors of predicted memory: peaks that rows print, and runs that failed for memory."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from turnout.errors import TurnoutError
from turnout.plan.memory import GIB, memory, memory_by_stage
from turnout.plan.parameters import fitted
from turnout.plan.predict import predict_row
from turnout.plan.rows import Row, cluster_of, job_of


@dataclass(frozen=True, kw_only=True)
class MemoryAccuracy:
    """Errors of predicted memory on rows that print a peak."""

    suite: str
    what: str  # peak, or what stays between steps
    n: int
    mape: float
    median: float
    bias: float


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """Prediction of out-of-memory as a classifier."""

    suite: str
    n: int
    refused: int  # layouts the planner does not model: more stages than blocks
    precision: float
    recall: float
    f1: float


def memory_errors(rows: Iterable[Row], models: dict[str, Row]) -> list[MemoryAccuracy]:
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        try:
            for what, predicted, measured in _memory_pairs(row, models):
                errors[str(row["suite"]), what].append(predicted / measured - 1)
        except TurnoutError:
            continue
    return [
        MemoryAccuracy(
            suite=suite, what=what, n=len(each), mape=mean(map(abs, each)), median=median(map(abs, each)),
            bias=mean(each),
        )
        for (suite, what), each in sorted(errors.items())
    ]  # fmt: skip


def _memory_pairs(row: Row, models: dict[str, Row]) -> list[tuple[str, float, float]]:
    """(what, predicted, measured) GiB of a row."""
    if str(row.get("quantity")).startswith("memory"):
        answer = predict_row(row, models, fitted())
        return [("analytic", answer.predicted, float(row["value"]))] if answer.predicted else []
    peak = row.get("peak_alloc_gib") or row.get("peak_mem_gib")
    if not peak or row.get("oom"):
        return []
    job = job_of(row, models)
    pairs = [("peak", memory(job).allocated_bytes / GIB, float(peak))]
    if row.get("alloc_gib"):
        resting = max(stage.resting_bytes for stage in memory_by_stage(job))
        pairs.append(("between steps", resting / GIB, float(row["alloc_gib"])))
    return pairs


def out_of_memory(rows: Sequence[Row]) -> OutOfMemory:
    """Runs that failed for memory against those predicted not to fit; runs that did both are left out."""
    true = false = missed = n = refused = 0
    for row in rows:
        failed = row["status"] == "OOM"
        if row["oom"] and not failed:
            continue
        try:
            predicted = not memory(job_of(row, {})).fits(cluster_of(row).device.memory_bytes)
        except TurnoutError:
            refused += 1
            continue
        n += 1
        true += predicted and failed
        false += predicted and not failed
        missed += failed and not predicted
    precision, recall = true / max(1, true + false), true / max(1, true + missed)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return OutOfMemory(suite="nanotron", n=n, refused=refused, precision=precision, recall=recall, f1=f1)
