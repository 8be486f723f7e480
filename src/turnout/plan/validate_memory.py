"""Errors of predicted memory: peaks that rows print, and runs that failed for memory."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from turnout.errors import TurnoutError
from turnout.plan.memory import CONTEXT_BYTES, GIB, memory, memory_by_stage
from turnout.plan.nanotron import host_of
from turnout.plan.nanotron_step import reserved_bytes
from turnout.plan.parameters import fitted
from turnout.plan.predict import MEMORY_QUANTITIES, UNREADABLE, is_reserved, predict_row
from turnout.plan.row_fields import Row
from turnout.plan.row_machine import cluster_of
from turnout.plan.rows import job_of


@dataclass(frozen=True, kw_only=True)
class MemoryAccuracy:
    """Errors of predicted memory on rows that print a peak."""

    suite: str
    what: str  # allocated at the peak, reserved, allocated between steps, or analytic
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
    refusals: tuple[tuple[str, str], ...]  # (row, why) of these
    precision: float
    recall: float
    f1: float


def memory_errors(rows: Iterable[Row], models: dict[str, Row]) -> list[MemoryAccuracy]:
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        try:
            for what, predicted, measured in _memory_pairs(row, models):
                errors[str(row.get("suite")), what].append(predicted / measured - 1)
        except (TurnoutError, *UNREADABLE):
            continue  # named among the refused where the row is about memory
    return [
        MemoryAccuracy(
            suite=suite, what=what, n=len(each), mape=mean(map(abs, each)), median=median(map(abs, each)),
            bias=mean(each),
        )
        for (suite, what), each in sorted(errors.items())
    ]  # fmt: skip


def _memory_pairs(row: Row, models: dict[str, Row]) -> list[tuple[str, float, float]]:
    """(what, predicted, measured) GiB of a row."""
    quantity = str(row.get("quantity"))
    if quantity.startswith(MEMORY_QUANTITIES):
        answer = predict_row(row, models, fitted())
        what = "reserved" if is_reserved(quantity) else "peak"
        what = "analytic" if "analytic" in str(row.get("exactness")) else what
        return [(what, answer.predicted, float(row["value"]))] if answer.predicted else []
    peak = row.get("peak_alloc_gib") or row.get("peak_mem_gib")
    if not peak or row.get("oom"):
        return []
    job = job_of(row, models)
    if "alloc_gib" not in row:
        needed = memory(job)
        # torchtitan prints max_memory_reserved: its components/metrics.py
        held = ("peak", needed.allocated_bytes) if row.get("peak_alloc_gib") else ("reserved", needed.reserved_bytes)
        return [(held[0], held[1] / GIB, float(peak))]
    # what rank 0 printed, which is of the first stage
    room = cluster_of(row).device.memory_bytes - CONTEXT_BYTES
    reserved = reserved_bytes(job, host_of(row, job, fitted()), room)
    resting = memory_by_stage(job)[0].resting_bytes
    return [("reserved", reserved / GIB, float(peak)), ("between steps", resting / GIB, float(row["alloc_gib"]))]


def out_of_memory(rows: Sequence[Row]) -> OutOfMemory:
    """Runs that failed for memory against those predicted not to fit; runs that did both are left out."""
    true = false = missed = n = 0
    refusals: list[tuple[str, str]] = []
    for row in rows:
        failed = row["status"] == "OOM"
        if row["oom"] and not failed:
            continue
        try:
            predicted = not memory(job_of(row, {})).fits(cluster_of(row).device.memory_bytes)
        except TurnoutError as error:
            refusals.append((str(row["id"]), str(error)))
            continue
        n += 1
        true += predicted and failed
        false += predicted and not failed
        missed += failed and not predicted
    precision, recall = true / max(1, true + false), true / max(1, true + missed)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return OutOfMemory(
        suite="nanotron",
        n=n,
        refused=len(refusals),
        refusals=tuple(refusals),
        precision=precision,
        recall=recall,
        f1=f1,
    )
