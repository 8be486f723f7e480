"""Fits the planner's parameters on calibration rows and writes them with the report of the fit.

    python -m benchmarks.fit_planner [--rounds N]

Rows: `split == "calibration"` of published_cases.json (newest release of each case), nanotron runs on one node for that
framework's scale and the host's launch time, and three means of kernels measured on B200, for no step in bf16 on
Blackwell is a calibration row. The objective is the mean absolute log ratio of predicted to
published, every suite counting alike. Pattern search in log space within physical bounds: no gradients, no seeds.
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from turnout.clusters import CLUSTERS
from turnout.errors import TurnoutError
from turnout.plan.compute import products_of
from turnout.plan.data import published_cases
from turnout.plan.engine import Engine
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.job import Job
from turnout.plan.micro import MicroCase, micro_case
from turnout.plan.nanotron import nanotron_cases
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.predict import answer_of_step
from turnout.plan.row_machine import cluster_of
from turnout.plan.row_words import precision_of
from turnout.plan.rows import job_of
from turnout.plan.shapes import SHAPES
from turnout.plan.time import step_time
from turnout.strategy import Strategy
from turnout.topology import Cluster

TARGET = Path(__file__).parents[1] / "src" / "turnout" / "plan" / "parameters.json"
# lowest and highest value that could be physical
BOUNDS = {
    "gemm_ampere": (0.5, 0.95), "gemm_hopper": (0.4, 0.95), "gemm_blackwell": (0.3, 0.95), "gemm_passes": (0.3, 4.0),
    "attention": (0.3, 0.8), "memory": (0.5, 0.95), "layer_call_s": (2e-4, 1e-2),
    "hidden_tp": (0.05, 0.95), "hidden_ep": (0.05, 0.97), "grouped": (0.4, 1.0),
    "low_blackwell": (0.4, 1.5), "scale_nanotron": (0.8, 2.0),
}  # fmt: skip


# SimuMax 1.2, configs/system/b200_bf16_ceperm.json: default `efficient_factor` of its B200, the mean over kernels it
# timed one by one; attention is counted there with all pairs of a sequence, here with those seen, and memory in GiB/s.
# https://github.com/MooreThreads/SimuMax
KERNEL_MODEL, KERNEL_TOKENS = "llama3-70b", 4096
KERNEL_SHARES = {"products": 0.488, "attention": 0.70 / 2, "element-wise": 0.666 * 2**30 / 1e9}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One calibration row, ready to be predicted again and again."""

    suite: str
    row: dict[str, Any]
    job: Job | MicroCase
    cluster: Cluster

    def ratio(self, parameters: Parameters) -> float:
        """Predicted over published time: above 1 is too slow, whatever the row's quantity."""
        key = tuple(getattr(parameters, name) for name in self._depends)
        if key not in self._seen:
            self._seen[key] = self._ratio(parameters)
        return self._seen[key]

    @cached_property
    def _depends(self) -> tuple[str, ...]:
        """Parameters that change the ratio: most moves of a fit leave most rows alone."""
        start = fitted()
        plain = self._ratio(start)
        return tuple(
            name for name, ends in BOUNDS.items()
            if any(self._ratio(replace(start, **{name: end})) != plain for end in ends)
        )  # fmt: skip

    @cached_property
    def _seen(self) -> dict[tuple[float, ...], float]:
        return {}

    def _ratio(self, parameters: Parameters) -> float:
        if isinstance(self.job, MicroCase):
            return self.job.answer(parameters) / float(self.row["value"])
        predicted = answer_of_step(self.row, self.job, step_time(self.job, self.cluster, parameters), self.cluster)
        ratio = predicted / float(self.row["value"])
        return ratio if str(self.row["quantity"]).startswith("step_time") else 1 / ratio


def calibration_cases() -> list[Case]:
    """The rows that may be fitted, in file order, nanotron's one-node runs every second."""
    document = published_cases()
    rows = [row for row in document["rows"] if row["split"] == "calibration" and row["primary"]]
    rows += [row for row in nanotron_cases(nodes=1)[::2] if row["primary"]]
    cases = []
    for row in rows:
        try:
            cluster = cluster_of(row)
            job = micro_case(row, cluster, precision_of(row)) or job_of(row, document["models"])
            case = Case(suite=row["suite"], row=row, job=job, cluster=cluster)
            case._ratio(fitted())
            cases.append(case)
        except TurnoutError:
            continue
    return [*cases, *kernel_cases()]


def kernel_cases() -> list[Case]:
    """Shares of B200's peaks that products, attention and element-wise work reach, as rows of a suite of their own."""
    job = Job(
        shape=SHAPES[KERNEL_MODEL], strategy=Strategy(dp=1), seq_len=KERNEL_TOKENS, global_batch=1,
        framework=FRAMEWORKS["megatron-core"],
    )  # fmt: skip
    cluster = CLUSTERS["dgx-b200"]
    peak = cluster.device.flops_per_s("bf16")

    def share_s(name: str, parameters: Parameters) -> float:
        """Seconds of what the peak does in one: the inverse of a share."""
        engine = Engine(device=cluster.device, parameters=parameters)
        if name == "attention":
            return engine.attention_s(peak)
        if name == "element-wise":
            return engine.bytes_s(cluster.device.memory_bytes_per_s)
        products = products_of(job, 0)
        flops = sum(2 * m * n * k for m, n, k in products)
        return sum(engine.product_s(*each, "bf16") for each in products) * peak / flops

    return [
        Case(
            suite="simumax_kernels", cluster=cluster, job=MicroCase(answer=partial(share_s, name)),
            row={"id": f"simumax-kernels-{name}", "split": "calibration", "primary": True, "value": 1 / share},
        )
        for name, share in KERNEL_SHARES.items()
    ]  # fmt: skip


def loss(cases: list[Case], parameters: Parameters) -> float:
    """Mean over suites of the mean absolute log ratio."""
    by_suite: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        # absolute for large errors, smooth below the 3 % that repeats of one run differ by
        by_suite[case.suite].append(math.hypot(math.log(case.ratio(parameters)), 0.03))
    return mean(mean(errors) for errors in by_suite.values())


def fit(cases: list[Case], start: Parameters, rounds: int) -> Parameters:
    """Pattern search: parameters are moved alone and in pairs while that helps, in steps that shrink.

    Pairs because efficiencies trade against each other: a valley that no single move follows.
    """
    best, best_loss, step = start, loss(cases, start), 0.15
    alone = [{name: power} for name in BOUNDS for power in (1, -1)]
    pairs = [{a: p, b: q} for a, b in itertools.combinations(BOUNDS, 2) for p in (1, -1) for q in (1, -1)]
    for _ in range(rounds):
        before = best_loss
        for move in (*alone, *pairs):
            while True:
                tried = _moved(best, move, step)
                tried_loss = loss(cases, tried)
                if tried_loss >= best_loss - 1e-5:
                    break
                best, best_loss = tried, tried_loss
        if before - best_loss < 1e-3:
            step /= 2
        if step < 0.01:
            break
    return best


def _moved(parameters: Parameters, move: dict[str, int], step: float) -> Parameters:
    """The parameters after a move, kept within their bounds."""
    values = {name: getattr(parameters, name) * (1 + step) ** power for name, power in move.items()}
    return replace(parameters, **{name: min(BOUNDS[name][1], max(BOUNDS[name][0], v)) for name, v in values.items()})


def report(cases: list[Case], parameters: Parameters) -> list[dict[str, Any]]:
    """Error of the fit by suite."""
    by_suite: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        by_suite[case.suite].append(case.ratio(parameters) - 1)
    return [
        {
            "suite": suite, "rows": len(errors), "mape": round(mean(map(abs, errors)), 4),
            "median": round(median(map(abs, errors)), 4), "bias": round(mean(errors), 4),
        }
        for suite, errors in sorted(by_suite.items())
    ]  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description="Fit the planner on calibration rows.")
    arguments.add_argument("--rounds", type=int, default=12, help="passes over all parameters")
    rounds = arguments.parse_args().rounds
    cases = calibration_cases()
    best = fit(cases, fitted(), rounds)
    document = {
        "parameters": {field.name: float(f"{getattr(best, field.name):.4g}") for field in fields(Parameters)},
        "fit": {
            "rows": len(cases), "objective": "mean over suites of mean |log(predicted / published)|",
            "loss": round(loss(cases, best), 5), "suites": report(cases, best),
            "script": "benchmarks/fit_planner.py", "split": "calibration rows alone; nanotron: runs on one node",
        },
    }  # fmt: skip
    TARGET.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
