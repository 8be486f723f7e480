"""The planner's error on published measurements, as values.

By suite: rows, refusals and why, MAPE, median, 90th percentile, maximum, bias, skill against one constant MFU fitted on
calibration rows, rank correlation and regret inside groups of layouts of one job; memory, and out-of-memory as a
classifier. Parameters are those of parameters.json; nothing is fitted here.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any, TypeGuard

from turnout.errors import TurnoutError
from turnout.plan.correlation import spearman
from turnout.plan.data import published_cases, vtrain_one_node_rows
from turnout.plan.job import Job
from turnout.plan.nanotron import nanotron_cases
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.predict import MEMORY_QUANTITIES, RATES, STEP_QUANTITIES, answer_of_step, predict_row
from turnout.plan.row_fields import Row
from turnout.plan.row_machine import cluster_of
from turnout.plan.rows import job_of
from turnout.plan.time import StepTime
from turnout.plan.validate_memory import MemoryAccuracy, OutOfMemory, memory_errors, out_of_memory
from turnout.plan.waterfall import peak_flops_per_s
from turnout.topology import Cluster

# Calculon (https://github.com/calculon-ai/calculon) at its stock settings: mean error, and rows it ran
CALCULON = {"megascale": (0.075, 8), "megatron_sc21_table1": (0.103, 10), "vtrain_multi": (0.129, 103),
            "megatron_2020": (0.145, 8)}  # fmt: skip
# SimuMax's own prediction of its rows with a profile of each shape; recomputed from its file
SIMUMAX = {"simumax_b200": (0.056, 43)}

# suites of so many rows that they alone would be the mean over all dense ones
APART = ("nanotron",)
OLDER = "older"  # split of rows that a later release of the same software made void: no headline counts them


@dataclass(frozen=True, kw_only=True)
class SuiteError:
    """Relative errors of one suite and split; shares, not percents."""

    suite: str
    split: str  # validation, calibration, sanity, OLDER, or SIMULATED
    n: int  # rows answered
    refused: int
    mape: float | None = None
    median: float | None = None
    p90: float | None = None
    max: float | None = None
    bias: float | None = None  # mean signed error of time: above 0 predicts too slow
    constant_mfu: float | None = None  # MAPE of one constant MFU
    skill: float | None = None  # 1 - mape / constant_mfu
    spearman: float | None = None  # mean over groups of layouts
    regret: float | None = None  # mean over groups: measured time of the predicted best over the measured best, less 1
    groups: int = 0  # of at least three layouts
    peer: str = ""  # another tool on the same suite
    peer_mape: float | None = None
    peer_n: int = 0  # rows it ran


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The whole report."""

    suites: tuple[SuiteError, ...]
    memory: tuple[MemoryAccuracy, ...]
    oom: tuple[OutOfMemory, ...]
    refusals: tuple[tuple[str, str, str], ...]  # (suite, row, why)
    dense_mape: float | None = None  # all validation rows of dense models alike, those of APART left out


def to_json(report: Validation) -> dict[str, Any]:
    """The report as the object `plan validate --json` prints; shares, not percents."""
    return asdict(report)


@dataclass(frozen=True, kw_only=True)
class _Result:
    """One row with what was predicted for it; errors are of time, whatever the quantity."""

    row: Row
    time_ratio: float  # predicted over measured
    constant_ratio: float | None  # the same for the constant MFU
    dense: bool


def validate(document: dict[str, Any] | None = None, parameters: Parameters | None = None) -> Validation:
    """The report on a file in the schema of published_cases.json; without one, on the visible suites.

    Raises: ConfigError if the file has no list `rows`.
    """
    parameters = parameters or fitted()
    visible = document is None
    document = published_cases() if document is None else document
    rows = list(document["rows"]) + (vtrain_one_node_rows() + nanotron_cases() if visible else [])
    models = document.get("models") or {}
    mfu = constant_mfu(parameters)
    results: dict[tuple[str, str], list[_Result]] = defaultdict(list)
    refusals: list[tuple[str, str, str]] = []
    refused: dict[tuple[str, str], int] = defaultdict(int)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            refused["", "validation"] += 1
            refusals.append(("", f"row {i}", f"the row is {type(row).__name__}, not an object"))
            continue
        key = (str(row.get("suite")), _split(row))
        result = _result(row, models, parameters, mfu)
        if isinstance(result, str):
            refused[key] += 1
            refusals.append((key[0], str(row.get("id")), result))
        elif result is not None:
            results[key].append(result)
    keys = sorted(set(results) | set(refused))
    judged = [each for (suite, split), part in results.items() for each in part if split == "validation"]
    dense = [abs(_error(each)) for each in judged if each.dense and each.row.get("suite") not in APART]
    return Validation(
        suites=tuple(_suite(*key, results[key], refused[key]) for key in keys),
        memory=tuple(memory_errors(filter(_may_be_judged, rows), models)),
        oom=(out_of_memory(nanotron_cases(failed=True)),) if visible else (),
        refusals=tuple(refusals),
        dense_mape=mean(dense) if dense else None,
    )


def _split(row: Row) -> str:
    split = str(row.get("split") or "validation")
    if row.get("suite") == "nanotron" and "nodes" in row:
        split = "calibration" if row["nodes"] == 1 else "validation"
    return split if row.get("primary", True) else OLDER


def _result(row: Row, models: dict[str, Row], parameters: Parameters, mfu: float) -> _Result | str | None:
    """The row's errors; why it is refused; nothing if it is about memory."""
    quantity = str(row.get("quantity"))
    answer = predict_row(row, models, parameters)
    if answer.predicted is None:
        return answer.refused
    measured = row.get("value")
    if not _is_measurement(measured):
        return f"value={measured!r} is not a measurement to compare with"
    if quantity.startswith(MEMORY_QUANTITIES):
        return None
    constant, dense = None, False
    if quantity.startswith(STEP_QUANTITIES):
        job, cluster = job_of(row, models), cluster_of(row)
        dense = job.shape.num_experts == 0
        baseline = answer_of_step(row, job, constant_step(job, cluster, mfu), cluster)
        constant = _time_ratio(quantity, baseline / measured)
    return _Result(
        row=row, time_ratio=_time_ratio(quantity, answer.predicted / measured), constant_ratio=constant, dense=dense
    )


def _is_measurement(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _may_be_judged(row: Any) -> bool:
    """Whether a row's memory, if it is about memory, can be compared."""
    if not isinstance(row, dict):
        return False
    return not str(row.get("quantity")).startswith(MEMORY_QUANTITIES) or _is_measurement(row.get("value"))


def _time_ratio(quantity: str, ratio: float) -> float:
    return 1 / ratio if quantity.startswith(RATES) or "bw" in quantity else ratio


# --- the baseline ---


def constant_mfu(parameters: Parameters) -> float:
    """The one share of the bf16 peak that suits calibration rows best: the median of what they reach."""
    document = published_cases()
    reached = []
    for row in document["rows"]:
        wanted = row["split"] == "calibration" and row["primary"] and row["quantity"].startswith(STEP_QUANTITIES)
        if not wanted:
            continue
        try:
            job, cluster = job_of(row, document["models"]), cluster_of(row)
        except TurnoutError:
            continue
        whole = constant_step(job, cluster, 1.0)
        ratio = answer_of_step(row, job, whole, cluster) / row["value"]
        reached.append(1 / ratio if _time_ratio(row["quantity"], 2.0) < 1 else ratio)
    return median(reached)


def constant_step(job: Job, cluster: Cluster, mfu: float) -> StepTime:
    """A step at a constant share of the bf16 peak (fp16 where there is none), all pairs of a sequence counted."""
    flops = 3 * job.shape.forward_flops_per_token(job.seq_len, causal=False) * job.global_batch * job.seq_len
    seconds = flops / (job.world * peak_flops_per_s(cluster) * mfu)
    nothing = dict.fromkeys(
        ("tp_s", "cp_s", "ep_s", "pp_s", "dp_s", "tax_s", "launch_s", "bubble_s", "optimizer_s"), 0.0
    )
    return StepTime(compute_s=seconds, step_s=seconds, **nothing)


# --- one suite ---


def _suite(suite: str, split: str, results: Sequence[_Result], refused: int) -> SuiteError:
    empty = SuiteError(suite=suite, split=split, n=len(results), refused=refused)
    if not results:
        return empty
    # errors as published: of the predicted quantity over the measured one
    errors = [_error(result) for result in results]
    absolute = sorted(map(abs, errors))
    constants = [_as_quantity(r, r.constant_ratio) - 1 for r in results if r.constant_ratio is not None]
    constant = mean(map(abs, constants)) if constants else None
    # which layout an older release ran best nobody asks
    correlation, regret, groups = _ranking(results if split != OLDER else ())
    peer, figures = ("Calculon", CALCULON) if suite in CALCULON else ("SimuMax", SIMUMAX)
    return replace(
        empty,
        mape=mean(absolute),
        median=median(absolute),
        p90=absolute[min(len(absolute) - 1, round(0.9 * (len(absolute) - 1)))],
        max=absolute[-1],
        bias=mean(result.time_ratio - 1 for result in results),
        constant_mfu=constant,
        skill=1 - mean(absolute) / constant if constant else None,
        spearman=correlation,
        regret=regret,
        groups=groups,
        peer=peer if suite in figures else "",
        peer_mape=figures[suite][0] if suite in figures else None,
        peer_n=figures[suite][1] if suite in figures else 0,
    )


def _error(result: _Result) -> float:
    return _as_quantity(result, result.time_ratio) - 1


def _as_quantity(result: _Result, time_ratio: float) -> float:
    """A ratio of times as the ratio of the row's own quantity: the same function is its own inverse."""
    return _time_ratio(str(result.row["quantity"]), time_ratio)


def _ranking(results: Sequence[_Result]) -> tuple[float | None, float | None, int]:
    """(rank correlation, regret of the top pick, groups) over layouts of the same model, devices and batch."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        row = result.row
        if not str(row["quantity"]).startswith(STEP_QUANTITIES):
            continue
        measured = _time_ratio(str(row["quantity"]), float(row["value"]))
        names = (
            "model",
            "dims",
            "gpus",
            "gpu",
            "gbs",
            "seq",
            "precision",
            "n_layers_override",
            "quantity",
            "recompute",
        )
        groups[tuple(str(row.get(name)) for name in names)].append((result.time_ratio * measured, measured))
    large = [group for group in groups.values() if len(group) >= 3]
    if not large:
        return None, None, 0
    regrets = [min(group)[1] / min(measured for _, measured in group) - 1 for group in large]
    return mean(spearman(group) for group in large), mean(regrets), len(large)
