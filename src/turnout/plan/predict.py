"""Answers rows in the schema of published_cases.json, each in its own quantity and unit, or refuses and says why."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

from turnout.errors import TurnoutError
from turnout.plan.job import Job
from turnout.plan.memory import memory, memory_by_stage
from turnout.plan.micro import micro_case
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.row_fields import Refused, Row
from turnout.plan.row_machine import cluster_of
from turnout.plan.rows import job_of, precision_of
from turnout.plan.time import StepTime, step_time
from turnout.plan.waterfall import peak_flops_per_s
from turnout.topology import Cluster

STEP_QUANTITIES = ("step_time", "tokens_per_s", "achieved_tflops", "model_tflops", "mfu", "hfu")
MEMORY_QUANTITIES = ("memory", "peak_mem", "peak_alloc")
_SIZES = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "B": 1, "bytes": 1}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The prediction of one row, or why there is none."""

    id: str
    predicted: float | None
    unit: str
    refused: str = ""  # why, if it is


def predict(
    rows: Sequence[Row], models: dict[str, Row] | None = None, parameters: Parameters | None = None
) -> list[Answer]:
    """One answer a row, in order. `models` are the file's own model records, for names SHAPES does not know."""
    return [predict_row(row, models or {}, parameters or fitted()) for row in rows]


def predict_row(row: Row, models: dict[str, Row], parameters: Parameters) -> Answer:
    """The answer to one row; never raises for what the row says."""
    if not isinstance(row, dict):
        return Answer(id="", predicted=None, unit="", refused=f"the row is {type(row).__name__}, not an object")
    name, unit = str(row.get("id", "")), str(row.get("unit", ""))
    try:
        predicted = _answer(row, models, parameters)
        if not isfinite(predicted):
            raise Refused(f"the prediction is {predicted}, which is no measurement")
        return Answer(id=name, predicted=predicted, unit=unit)
    except TurnoutError as error:
        return Answer(id=name, predicted=None, unit=unit, refused=str(error))
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        # a field of a kind that no code here expects is the row's fault, and other rows still have answers
        return Answer(id=name, predicted=None, unit=unit, refused=f"the row cannot be read: {error!r}")


def _answer(row: Row, models: dict[str, Row], parameters: Parameters) -> float:
    quantity = str(row.get("quantity"))
    cluster = cluster_of(row)
    part = micro_case(row, cluster, precision_of(row))
    if part is not None:
        return part.answer(parameters)
    if quantity.startswith(MEMORY_QUANTITIES):
        return _memory_bytes(row, job_of(row, models)) / _size(str(row.get("unit") or "GiB"))
    if not quantity.startswith(STEP_QUANTITIES):
        known = ", ".join((*STEP_QUANTITIES, *MEMORY_QUANTITIES))
        raise Refused(f"quantity {quantity!r} is not modelled; modelled: {known}, parts of a step")
    job = job_of(row, models)
    return answer_of_step(row, job, step_time(job, cluster, parameters), cluster)


# --- what a row asks ---


def answer_of_step(row: Row, job: Job, step: StepTime, cluster: Cluster) -> float:
    """A predicted step in the quantity and unit of a row."""
    quantity, unit = str(row["quantity"]), str(row.get("unit"))
    tokens_per_s = step.tokens_per_s(job)
    if quantity.startswith("step_time"):
        return step.step_s * (1e3 if unit == "ms" else 1.0)
    if quantity.startswith("tokens_per_s"):
        return tokens_per_s / (job.world if "per_gpu" in quantity or "GPU" in unit else 1)
    tflops = flops_per_token(row, job) * tokens_per_s / job.world / 1e12
    if quantity.startswith(("achieved_tflops", "model_tflops")):
        return tflops
    peak = re.search(r"of ([\d.]+)", unit)
    share = tflops / (float(peak[1]) if peak else peak_flops_per_s(cluster) / 1e12)
    return 100 * share if "%" in unit else share


def flops_per_token(row: Row, job: Job) -> float:
    """Training FLOPs of a token by the row's own definition.

    All pairs of a sequence count, as in the Megatron papers, unless the row says causal or is of Megatron-Bridge, whose
    printed TFLOP/s are causal. "with_recompute" counts a second forward pass of the blocks, not of the output matrix.
    """
    words = " ".join(str(row.get(key) or "") for key in ("quantity", "notes", "flops", "suite")).lower()
    causal = "causal" in words or "bridge" in words
    forward = job.shape.forward_flops_per_token(job.seq_len, causal=causal)
    if "with_recompute" in words or "hfu" in words:
        return 4 * forward - 2 * job.shape.vocab_size * job.shape.dim
    return 3 * forward


def _size(unit: str) -> int:
    """Bytes of a unit of memory."""
    if unit not in _SIZES:
        raise Refused(f"unit {unit!r} is none of memory; known: {', '.join(_SIZES)}")
    return _SIZES[unit]


def _memory_bytes(row: Row, job: Job) -> float:
    quantity = str(row["quantity"])
    if "weights_optimizer" in quantity:
        return memory_by_stage(job)[0].model_bytes
    if "activations" not in quantity:
        return memory(job).allocated_bytes
    sequence = "sp" in quantity.split("_")
    recompute = "selective" if "selective" in quantity else "none"
    strategy = replace(job.strategy, sequence_parallel=sequence, recompute=recompute)
    return memory_by_stage(replace(job, strategy=strategy))[0].activations_bytes
