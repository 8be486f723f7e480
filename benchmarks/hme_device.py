"""How long an EM iteration takes by torch on a device, beside numpy's.

Usage: python -m benchmarks.hme_device [--device cuda] [--rows 1000000]. 50 inputs, 64 experts, one output; wall clock
of whole iterations (the difference of fits of 1 and 1 + MORE), after a first fit that is not counted. numpy's side has
a tenth of the rows, with as many threads as it takes. Ends in one line of JSON.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from benchmarks.hme_problem import problem
from turnout.hme.em import EMConfig, fit_em
from turnout.hme.rows import Rows
from turnout.hme.space import space_for
from turnout.hme.workspace import Workspace

INPUTS, DEPTH, MORE = 50, 6, 5


def beside_numpy(device: str = "cuda", num_rows: int = 1_000_000) -> dict[str, Any]:
    """Seconds an iteration of a million rows on the device, and by numpy scaled to as many from a tenth of them."""
    there, here = _measured(device, num_rows), _measured(None, num_rows // 10)
    gap = np.abs(np.array(_measured(device, num_rows // 10)["loglik_a_row"]) - here["loglik_a_row"]).max()
    return {
        "rows": [
            {"case": f"hme EM iteration, {num_rows} x {INPUTS}, {2**DEPTH} experts", "ms": 1e3 * there["iteration_s"]},
            {"case": f"the same by numpy, {num_rows // 10} rows", "ms": 1e3 * here["iteration_s"]},
        ],
        "times_as_fast_a_row": 10 * here["iteration_s"] / there["iteration_s"],
        "first_pass_s": there["first_s"],
        "loglik_gap_a_row": float(gap),
    }


def _measured(device: str | None, num_rows: int) -> dict[str, Any]:
    mixture, rows = problem(num_rows, INPUTS, DEPTH, 1)
    rows = Rows(x_NP=rows.x_NP, y_NT=rows.y_NT, weight_N=rows.weight_N, work=Workspace(space_for(device)))

    def seconds(iterations: int) -> float:
        begun = time.perf_counter()
        paths.append(fit_em(mixture, rows, EMConfig(max_iter=iterations, tol=0)).loglik_path)
        return time.perf_counter() - begun  # the paths are Python's numbers: the device has nothing left to do

    paths: list[tuple[float, ...]] = []
    first_s = seconds(1)
    one_s, more_s = seconds(1), seconds(1 + MORE)
    return {
        "iteration_s": (more_s - one_s) / MORE, "first_s": first_s,
        "loglik_a_row": [value / num_rows for value in paths[-1]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    print(json.dumps({"torch": torch.__version__, **beside_numpy(options.device, options.rows)}))


if __name__ == "__main__":
    main()
