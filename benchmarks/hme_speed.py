"""How long an EM iteration takes, beside the same mathematics written as a loop over experts and gates, in two layouts.

Usage: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.hme_speed [--large] [--iterations N] [--out FILE].
CPU seconds of one core; the sides take turns, least and median are shown. `--large`: iterations on 10^6 x 50 with 64
experts read from a memory map, and the memory they take. `--packages [NAME ...]`: beside packages of R and PyPI, those
of `benchmarks.hme_packages` that are installed, instead. Ends in one line of JSON.
"""

import argparse
import json
import resource
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np

# fits of this size import it: here, so that its 50 MiB of code are none of the memory of a fit
import torch  # noqa: F401
from sklearn.linear_model import LinearRegression, LogisticRegression

from benchmarks.hme_packages import PACKAGES, beside
from benchmarks.hme_problem import cpu_s, on_disk, problem
from turnout.hme.em import EMConfig, fit_em, ridge_of
from turnout.hme.gaussian import Gaussian
from turnout.hme.glim import WHOLE
from turnout.hme.mixture import Mixture
from turnout.hme.sweep import Rows
from turnout.hme.tree import Floats

RIDGE = 1e-3
MORE = 5  # iterations whose time is taken together


def loop_iteration(mixture: Mixture, rows: Rows, *, experts_in_rows: bool = False) -> Mixture:
    """One EM iteration as the paper writes it: node by node, each expert and each gate by itself.

    `experts_in_rows`: posteriors stand expert by expert and squares are summed by einsum, as after a look at a profile.
    """
    posterior_NL, share = _loop_e_step(mixture, rows, experts_in_rows=experts_in_rows)
    x_NP, y_NO, tree = rows.x_NP, rows.y_NT, mixture.tree
    ridge_P = ridge_of(RIDGE, x_NP.shape[1])
    weight_LPO, covariance_LOO = np.empty_like(mixture.experts.weight_LPO), mixture.experts.covariance_LOO.copy()
    for leaf in range(tree.num_leaves):
        weight_LPO[leaf], variance = _loop_expert(x_NP, y_NO, posterior_NL[:, leaf], ridge_P)
        covariance_LOO[leaf] = variance * np.eye(y_NO.shape[1])
    gate_GPO, below = mixture.gate_GPO.copy(), {~leaf: posterior_NL[:, leaf] for leaf in range(tree.num_leaves)}
    for g in reversed(range(tree.num_gates)):
        first_N, second_N = (below[int(child)] for child in tree.child_GB[g])
        below[g] = first_N + second_N
        gate_GPO[g, :, 0] = _loop_gate(x_NP, first_N, below[g], share[g], gate_GPO[g, :, 0], ridge_P)
    experts = replace(mixture.experts, weight_LPO=weight_LPO, covariance_LOO=covariance_LOO)
    return replace(mixture, gate_GPO=gate_GPO, experts=experts)


def library_iteration(mixture: Mixture, rows: Rows) -> None:
    """The same M-steps by scikit-learn's estimators, gates to their maximum: what one writes without thinking."""
    posterior_NL, _ = _loop_e_step(mixture, rows)
    x_ND, tree = rows.x_NP[:, :-1], mixture.tree
    for leaf in range(tree.num_leaves):
        LinearRegression().fit(x_ND, rows.y_NT, posterior_NL[:, leaf])
    twice_ND, side_N = np.vstack([x_ND, x_ND]), np.repeat([1, 0], len(x_ND))
    for g in range(tree.num_gates):
        mass_NB = posterior_NL @ tree.under_GBL[g].T
        LogisticRegression(C=1 / RIDGE, solver="newton-cholesky").fit(twice_ND, side_N, mass_NB.T.ravel())


def _loop_e_step(mixture: Mixture, rows: Rows, *, experts_in_rows: bool = False) -> tuple[Floats, list[Floats]]:
    x_NP, y_NO, tree = rows.x_NP, rows.y_NT, mixture.tree
    share = [1 / (1 + np.exp(-x_NP @ mixture.gate_GPO[g, :, 0])) for g in range(tree.num_gates)]
    log_prior = {0: np.zeros(len(x_NP))}
    for g in range(tree.num_gates):
        first, second = (int(child) for child in tree.child_GB[g])
        log_prior[first] = log_prior[g] + np.log(share[g])
        log_prior[second] = log_prior[g] + np.log(1 - share[g])
    joint_NL = np.empty((tree.num_leaves, len(x_NP))).T if experts_in_rows else np.empty((len(x_NP), tree.num_leaves))
    for leaf in range(tree.num_leaves):
        error_NO = y_NO - x_NP @ mixture.experts.weight_LPO[leaf]
        variance = mixture.experts.covariance_LOO[leaf, 0, 0]
        square_N = np.einsum("no,no->n", error_NO, error_NO) if experts_in_rows else (error_NO**2).sum(axis=1)
        density_N = -0.5 * square_N / variance - 0.5 * y_NO.shape[1] * np.log(2 * np.pi * variance)
        joint_NL[:, leaf] = log_prior[~leaf] + density_N
    likely_NL = np.exp(joint_NL - joint_NL.max(axis=1, keepdims=True))
    return likely_NL / likely_NL.sum(axis=1, keepdims=True), share


def _loop_expert(x_NP: Floats, y_NO: Floats, h_N: Floats, ridge_P: Floats) -> tuple[Floats, float]:
    """Weighted least squares, and the variance that is left, with the priors of `Gaussian`."""
    weighted_NP, prior = h_N[:, None] * x_NP, Gaussian(targets=y_NO.shape[1])
    weight_PO = np.linalg.solve(weighted_NP.T @ x_NP + np.diag(ridge_P), weighted_NP.T @ y_NO)
    square = (h_N[:, None] * (y_NO - x_NP @ weight_PO) ** 2).sum() + (ridge_P[:, None] * weight_PO**2).sum()
    rows = h_N.sum() + prior.noise_rows
    return weight_PO, (square / y_NO.shape[1] + prior.noise_rows * prior.noise_floor) / rows


def _loop_gate(x_NP: Floats, first_N: Floats, both_N: Floats, share_N: Floats, gate_P: Floats, ridge_P: Floats):
    """One Newton step for a gate of two branches, as long as is safe."""
    curved_NP = (both_N * share_N * (1 - share_N))[:, None] * x_NP
    slope_P = x_NP.T @ (first_N - both_N * share_N) - ridge_P * gate_P
    step_P = np.linalg.solve(curved_NP.T @ x_NP + np.diag(ridge_P), slope_P)
    move = np.abs(x_NP @ step_P).max()
    return gate_P + step_P * (1.0 if move <= WHOLE else np.log1p(move) / move)


def small(turns: int = 20) -> dict[str, float]:
    """15,000 x 12, 16 experts, 4 outputs."""
    mixture, rows = problem(15_000, 12, 4, 4)
    mixture = fit_em(mixture, rows, EMConfig(max_iter=4, tol=0)).mixture
    ours = lambda n: fit_em(mixture, rows, EMConfig(max_iter=n, tol=0))  # noqa: E731
    one, more, loop, by_rows, library = [], [], [], [], []
    for turn in range(turns):
        one.append(cpu_s(lambda: ours(1)))
        more.append(cpu_s(lambda: ours(1 + MORE)))
        loop.append(cpu_s(lambda: loop_iteration(mixture, rows)))
        by_rows.append(cpu_s(lambda: loop_iteration(mixture, rows, experts_in_rows=True)))
        if turn % 5 == 0:
            library.append(cpu_s(lambda: library_iteration(mixture, rows)))
    # a fit of n iterations makes n + 1 passes: the difference is whole iterations
    iteration = (np.array(more) - np.array(one)) / MORE
    return {
        "iteration_s_min": (min(more) - min(one)) / MORE, "iteration_s_median": float(np.median(iteration)),
        "loop_s_min": min(loop), "loop_s_median": float(np.median(loop)),
        "loop_by_rows_s_median": float(np.median(by_rows)), "library_loop_s_median": float(np.median(library)),
        "times_faster_than_loop": float(np.median(np.array(loop) / iteration)),
        "times_faster_than_loop_by_rows": float(np.median(np.array(by_rows) / iteration)),
        "times_faster_than_library_loop": float(np.median(library) / np.median(iteration)),
    }  # fmt: skip


def large(iterations: int = 2) -> dict[str, float | list[float]]:
    """10^6 x 50, 64 experts, one output, from disk: time, and all memory that numpy asked for."""
    with tempfile.TemporaryDirectory() as folder:
        mixture, rows = on_disk(Path(folder), 1_000_000, 50, 6)
        tracemalloc.start()
        wall = time.perf_counter()
        fits = []
        seconds = cpu_s(lambda: fits.append(fit_em(mixture, rows, EMConfig(max_iter=iterations, tol=0))))
        wall = time.perf_counter() - wall
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return {
            "large_passes": fits[0].passes, "large_cpu_s_a_pass": seconds / fits[0].passes,
            "large_wall_s_a_pass": wall / fits[0].passes, "large_peak_mib": peak / 2**20,
            "large_data_mib": rows.x_NP.nbytes / 2**20, "large_loglik_a_row": [v / 1e6 for v in fits[0].loglik_path],
            "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only-large", action="store_true")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=2, help="of the large fit")
    parser.add_argument("--packages", nargs="*", choices=list(PACKAGES), help="beside these; none named: all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.packages is not None:
        found = beside(options.packages or list(PACKAGES), options.turns)
    else:
        found = {} if options.only_large else small(options.turns)
        found |= large(options.iterations) if options.large or options.only_large else {}
    for name, figure in found.items():
        print(f"{name:32} {f'{figure:.4f}' if isinstance(figure, float) else figure}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
