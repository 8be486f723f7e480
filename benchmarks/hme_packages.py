"""An EM iteration beside that of a package from PyPI: `cgmm.MixtureOfExpertsRegressor`, one gate over linear experts.

Usage: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.hme_packages [--rows 15000] [--turns 3].
Needs `pip install cgmm`. Both fit a softmax gate over all experts with diagonal noise; CPU seconds of one core, from
the difference between fits of one and of three iterations. Ends in one line of JSON.
"""

import argparse
import json
from importlib.metadata import version

import numpy as np
from cgmm import MixtureOfExpertsRegressor

from benchmarks.hme_speed import cpu_s, problem
from turnout.hme.em import EMConfig, fit_em
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import new_mixture
from turnout.hme.tree import Tree


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    _, rows = problem(options.rows, 12, 1, 4)
    x_ND, size = rows.x_NP[:, :-1], rows.x_NP.shape[1]
    tree, family = Tree.complete(1, options.experts), Gaussian(targets=4, noise="diagonal")
    start = new_mixture(tree, family, rows.y_NT.T, rows.weight_N, size, np.random.default_rng(0))

    def ours(iterations: int) -> None:
        fit_em(start, rows, EMConfig(max_iter=iterations, tol=0))

    def theirs(iterations: int) -> None:
        MixtureOfExpertsRegressor(
            options.experts, covariance_type="diag", init_params="random", max_iter=iterations, tol=-np.inf,
            random_state=0,
        ).fit(x_ND, rows.y_NT)  # fmt: skip

    found: dict[str, float | str] = {"cgmm": version("cgmm")}
    for name, run in (("ours_s", ours), ("cgmm_s", theirs)):
        run(1)
        turns = [(cpu_s(lambda: run(3)) - cpu_s(lambda: run(1))) / 2 for _ in range(options.turns)]  # noqa: B023
        found[name] = float(np.median(turns))
    found["times_faster"] = float(found["cgmm_s"]) / float(found["ours_s"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
