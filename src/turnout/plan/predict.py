"""Answers rows in the schema of published_cases.json, each in its own quantity and unit, or refuses and says why."""

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
from turnout.plan.row_units import (
    BYTES,
    FLOPS_PER_S,
    SECONDS,
    SEQUENCES_PER_S,
    TOKENS_PER_S,
    Unit,
    share_of,
    unit_of,
)
from turnout.plan.row_words import precision_of
from turnout.plan.rows import job_of
from turnout.plan.time import StepTime, step_time
from turnout.plan.waterfall import peak_flops_per_s
from turnout.topology import Cluster

TOKEN_RATES, SEQUENCE_RATES = ("tokens_per_s",), ("samples_per_s", "sequences_per_s")
FLOP_RATES, SHARES = ("achieved_tflops", "model_tflops", "tflops"), ("mfu", "hfu")
RATES = (*TOKEN_RATES, *SEQUENCE_RATES, *FLOP_RATES, *SHARES)  # a shorter step has more of these
STEP_QUANTITIES = ("step_time", *RATES)
MEMORY_QUANTITIES = ("memory", "peak_mem", "peak_alloc", "peak_reserved", "max_allocated", "max_reserved")
# what a row that nothing here expects may raise
UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError)


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
    except UNREADABLE as error:
        # a field of a kind that no code here expects is the row's fault, and other rows still have answers
        return Answer(id=name, predicted=None, unit=unit, refused=f"the row cannot be read: {error!r}")


def _answer(row: Row, models: dict[str, Row], parameters: Parameters) -> float:
    quantity = str(row.get("quantity"))
    cluster = cluster_of(row)
    part = micro_case(row, cluster, precision_of(row))
    if part is not None:
        return part.answer(parameters)
    if quantity.startswith(MEMORY_QUANTITIES):
        size = unit_of(row, BYTES, "B" if quantity.endswith("_bytes") else "GiB")
        return _memory_bytes(row, job_of(row, models)) * size.per_ours
    if not quantity.startswith(STEP_QUANTITIES):
        known = ", ".join((*STEP_QUANTITIES, *MEMORY_QUANTITIES))
        raise Refused(f"quantity {quantity!r} is not modelled; modelled: {known}, parts of a step")
    job = job_of(row, models)
    return answer_of_step(row, job, step_time(job, cluster, parameters), cluster)


# --- what a row asks ---


def answer_of_step(row: Row, job: Job, step: StepTime, cluster: Cluster) -> float:
    """A predicted step in the quantity and unit of a row."""
    quantity, tokens_per_s = str(row["quantity"]), step.tokens_per_s(job)
    if quantity.startswith("step_time"):
        return step.step_s * unit_of(row, SECONDS, "ms" if quantity.endswith("_ms") else "s").per_ours
    if quantity.startswith(TOKEN_RATES):
        return _of_devices(row, tokens_per_s, unit_of(row, TOKENS_PER_S, "tok/s"), job.world)
    if quantity.startswith(SEQUENCE_RATES):
        return _of_devices(row, tokens_per_s / job.seq_len, unit_of(row, SEQUENCES_PER_S, "seq/s"), job.world)
    flops_per_s = flops_per_token(row, job) * tokens_per_s / job.world
    if quantity.startswith(FLOP_RATES):
        return flops_per_s * unit_of(row, FLOPS_PER_S, "TFLOP/s").per_ours
    whole, peak = share_of(row)
    return whole * flops_per_s / (peak * 1e12 if peak else peak_flops_per_s(cluster))


def _of_devices(row: Row, rate: float, unit: Unit, devices: int) -> float:
    """A rate of all devices as the row counts it: of all, or of one."""
    one = unit.per_device or "per_gpu" in str(row["quantity"])
    return rate * unit.per_ours / (devices if one else 1)


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


def _memory_bytes(row: Row, job: Job) -> float:
    quantity = str(row["quantity"])
    if "weights_optimizer" in quantity:
        return memory_by_stage(job)[0].model_bytes
    if "activations" not in quantity:
        needed = memory(job)
        return needed.reserved_bytes if is_reserved(quantity) else needed.allocated_bytes
    sequence = "sp" in quantity.split("_")
    recompute = "selective" if "selective" in quantity else "none"
    strategy = replace(job.strategy, sequence_parallel=sequence, recompute=recompute)
    return memory_by_stage(replace(job, strategy=strategy))[0].activations_bytes


def is_reserved(quantity: str) -> bool:
    """Whether a peak of that name is of what the allocator holds, as torchtitan prints it, or of what is allocated."""
    return quantity.startswith("peak_mem") or "reserved" in quantity
