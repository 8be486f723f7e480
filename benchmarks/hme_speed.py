"""How long an EM iteration takes, beside the same mathematics written as a loop over experts and gates.

Usage: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.hme_speed [--large]. CPU seconds of one core;
the two sides take turns, least and median are shown. `--large`: one iteration on 10^6 x 50 with 64 experts, and its
memory. Ends in one line of JSON.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from turnout.hme.em import EMConfig, fit_em
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.sweep import Rows
from turnout.hme.tree import Floats, Tree

RIDGE = 1e-3


def loop_iteration(mixture: Mixture, rows: Rows) -> Mixture:
    """One EM iteration as the paper writes it: node by node, each expert and each gate by itself."""
    x_NP, y_NO, tree = rows.x_NP, rows.y_NT, mixture.tree
    share = {g: _shares(x_NP @ mixture.gate_GPO[g]) for g in range(tree.num_gates)}
    log_prior = {0: np.zeros(len(x_NP))}
    for g in range(tree.num_gates):
        for b, child in enumerate(tree.child_GB[g]):
            log_prior[int(child)] = log_prior[g] + np.log(share[g][:, b])
    joint_NL = np.empty((len(x_NP), tree.num_leaves))
    for leaf in range(tree.num_leaves):
        error_NO = y_NO - x_NP @ mixture.experts.weight_LPO[leaf]
        variance = mixture.experts.covariance_LOO[leaf, 0, 0]
        density_N = -0.5 * (error_NO**2).sum(axis=1) / variance - 0.5 * y_NO.shape[1] * np.log(2 * np.pi * variance)
        joint_NL[:, leaf] = log_prior[~leaf] + density_N
    joint_NL -= joint_NL.max(axis=1, keepdims=True)
    posterior_NL = np.exp(joint_NL) / np.exp(joint_NL).sum(axis=1, keepdims=True)
    return _loop_m_step(mixture, rows, posterior_NL, share)


def _loop_m_step(mixture: Mixture, rows: Rows, posterior_NL: Floats, share: dict[int, Floats]) -> Mixture:
    x_NP, y_NO, tree = rows.x_NP, rows.y_NT, mixture.tree
    eye_PP = RIDGE * np.eye(x_NP.shape[1])
    weight_LPO, covariance_LOO = np.empty_like(mixture.experts.weight_LPO), mixture.experts.covariance_LOO.copy()
    for leaf in range(tree.num_leaves):
        h_N1 = posterior_NL[:, leaf, None]
        weight_LPO[leaf] = np.linalg.solve((h_N1 * x_NP).T @ x_NP + eye_PP, (h_N1 * x_NP).T @ y_NO)
        square = (h_N1 * (y_NO - x_NP @ weight_LPO[leaf]) ** 2).sum()
        covariance_LOO[leaf] = np.eye(y_NO.shape[1]) * square / (h_N1.sum() * y_NO.shape[1])
    gate_GPO, below = mixture.gate_GPO.copy(), {~leaf: posterior_NL[:, leaf] for leaf in range(tree.num_leaves)}
    for g in reversed(range(tree.num_gates)):
        first_N, second_N = (below[int(child)] for child in tree.child_GB[g])
        below[g] = first_N + second_N
        gate_GPO[g] = _loop_gate(x_NP, first_N, below[g], gate_GPO[g], eye_PP)
    return replace(
        mixture,
        gate_GPO=gate_GPO,
        experts=replace(mixture.experts, weight_LPO=weight_LPO, covariance_LOO=covariance_LOO),
    )


def _loop_gate(x_NP: Floats, first_N: Floats, both_N: Floats, gate_P1: Floats, eye_PP: Floats) -> Floats:
    """One Newton step for a gate of two branches, kept if its likelihood rose, as ours is."""
    share_N = _shares(x_NP @ gate_P1)[:, 0]
    curve_N1 = (both_N * share_N * (1 - share_N))[:, None]
    slope_P1 = x_NP.T @ (first_N - both_N * share_N)[:, None]
    step_P1 = np.linalg.solve((curve_N1 * x_NP).T @ x_NP + eye_PP, slope_P1 - eye_PP @ gate_P1)
    tried_N = _shares(x_NP @ (gate_P1 + step_P1))[:, 0]
    gained = first_N @ np.log(tried_N / share_N) + (both_N - first_N) @ np.log((1 - tried_N) / (1 - share_N))
    return gate_P1 + step_P1 if gained >= 0 else gate_P1


def _shares(predictor_N1: Floats) -> Floats:
    first_N1 = 1 / (1 + np.exp(-predictor_N1.clip(-30, 30)))
    return np.hstack([first_N1, 1 - first_N1])


def problem(num_rows: int, inputs: int, depth: int, outputs: int, seed: int = 0) -> tuple[Mixture, Rows]:
    """A smooth function with a fold at random planes, and a mixture a few iterations into it."""
    random = np.random.default_rng(seed)
    x_NP = np.empty((num_rows, inputs + 1))
    x_NP[:, :-1] = random.normal(size=(num_rows, inputs))
    x_NP[:, -1] = 1
    fold_PO, slope_PO = random.normal(size=(2, inputs + 1, outputs))
    y_NO = np.abs(x_NP @ fold_PO) + x_NP @ slope_PO + 0.1 * random.normal(size=(num_rows, outputs))
    rows = Rows(x_NP=x_NP, y_NT=y_NO, weight_N=np.ones(num_rows))
    tree = Tree.complete(depth, 2)
    return new_mixture(tree, Gaussian(targets=outputs), y_NO.T, rows.weight_N, inputs + 1, random), rows


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def small(turns: int = 20) -> dict[str, float]:
    """15,000 x 12, 16 experts, 4 outputs."""
    mixture, rows = problem(15_000, 12, 4, 4)
    mixture = fit_em(mixture, rows, EMConfig(max_iter=4, tol=0)).mixture
    # a fit of n iterations begins with a pass that the next one would have made: the difference is one iteration
    ours = lambda n: fit_em(mixture, rows, EMConfig(max_iter=n, tol=0))  # noqa: E731
    one, two, loop = [], [], []
    for _ in range(turns):
        one.append(cpu_s(lambda: ours(1)))
        two.append(cpu_s(lambda: ours(2)))
        loop.append(cpu_s(lambda: loop_iteration(mixture, rows)))
    iteration = np.array(two) - np.array(one)
    return {
        "iteration_s_min": float(iteration.min()),
        "iteration_s_median": float(np.median(iteration)),
        "loop_s_min": float(min(loop)),
        "loop_s_median": float(np.median(loop)),
        "times_faster": float(np.median(loop) / np.median(iteration)),
    }


def large() -> dict[str, float]:
    """10^6 x 50, 64 experts, one output: an iteration, and the memory it takes beyond the data."""
    mixture, rows = problem(1_000_000, 50, 6, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = cpu_s(lambda: fit_em(mixture, rows, EMConfig(max_iter=1, tol=0)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"large_s": seconds, "large_extra_mib": (peak - before) / 1024, "data_mib": rows.x_NP.nbytes / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    found = small() | (large() if options.large else {})
    for name, figure in found.items():
        print(f"{name:20} {figure:.4f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
