"""The robot arm of Jordan & Jacobs 1994, regenerated: which acceleration follows from position, speed and torque.

Usage: python -m benchmarks.hme_robot_arm [--seeds 10] [--models NAME ...] [--out FILE]. Needs mujoco and scikit-learn.
Prints relative error (mean squared error over variance of the targets, on 5,000 rows of their own) and passes over the
data (the first pass whose error is within 5 % of the least, as in the paper), then one line of JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputRegressor
from sklearn.tree import DecisionTreeRegressor

from benchmarks.hme_arm import NUM_TRAIN, Floats, robot_arm
from benchmarks.hme_rivals import Backprop, LinearTree, Splines
from turnout.hme.ascent import AscentConfig, fit_ascent
from turnout.hme.em import EMConfig, fit_em
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.online import OnlineConfig, Recursion, learn_rows
from turnout.hme.sweep import Rows
from turnout.hme.tree import Tree

Progress = Iterator[tuple[int, Floats]]  # passes so far, predictions for the test rows
PUBLISHED = {  # relative error, passes: Jordan & Jacobs 1994, tables 1 and 2
    "linear": (0.31, 1), "HME, algorithm 1": (0.10, 35), "HME, algorithm 2": (0.12, 39),
    "HME, on-line as published": (0.12, 2), "HME, gradient": (0.15, 104), "backprop, batch": (0.09, 5500),
    "backprop, on-line": (0.08, 63), "CART": (0.17, None), "CART, linear leaves": (0.13, None),
    "MARS-like": (0.16, None),
}  # fmt: skip

FASTER_BACKPROP = "backprop, batch, 4 times the rate"
PUBLISHED_ONLINE = OnlineConfig(
    gates="log_posteriors", forgets="all", block_rows=1, settle_share=0.6, gate_variance=0.01
)


def _em(algorithm: int, iterations: int, depth: int = 4, noise: float = 1.0, held: int = 0) -> Callable[..., Progress]:
    """EM with the noise at `noise` variances of the targets for the first `held` iterations."""

    def run(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
        rows = _rows(x_ND, y_NO)
        mixture, passes = _start(rows, seed, depth, noise), 0
        for done in range(iterations):
            config = EMConfig(algorithm=algorithm, max_iter=1, tol=0, hold_noise=int(done < held))
            fit = fit_em(mixture, rows, config, keep_last=True)
            mixture, passes = fit.mixture, passes + fit.passes - 1  # the last pass is the next iteration's first
            yield passes, _predict(mixture, test_ND)

    return run


def _online(passes: int, config: OnlineConfig) -> Callable[..., Progress]:
    def run(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
        rows, random = _rows(x_ND, y_NO), np.random.default_rng(seed)
        state = Recursion.start(_start(rows, seed), config)
        for done in range(1, passes + 1):
            state = learn_rows(state, rows.taken(random.permutation(len(rows))), config)
            yield done, _predict(state.mixture, test_ND)

    return run


def _gradient(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
    rows, random = _rows(x_ND, y_NO), np.random.default_rng(seed)
    mixture = _start(rows, seed)
    for passes in range(1, 61):
        mixture = fit_ascent(mixture, rows, AscentConfig(max_iter=1, tol=0), random, keep_last=True).mixture
        yield passes, _predict(mixture, test_ND)


def _backprop(batch_size: int, rate: float, momentum: float, passes: int, every: int) -> Callable[..., Progress]:
    def run(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
        net = Backprop((x_ND.shape[1], 60, y_NO.shape[1]), rate, momentum, seed)
        for done in range(1, passes + 1):
            net.run_pass(x_ND, y_NO, batch_size)
            if done % every == 0:
                yield done, net.predict(test_ND)

    return run


def _once(make: Callable[[int], object]) -> Callable[..., Progress]:
    def run(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
        yield 1, make(seed).fit(x_ND, y_NO).predict(test_ND)  # type: ignore[attr-defined]

    return run


MODELS: dict[str, Callable[..., Progress]] = {
    "linear": _once(lambda seed: LinearRegression()),
    "HME, algorithm 1": _em(1, 60),
    "HME, algorithm 2": _em(2, 60),
    "HME, algorithm 1, 64 experts": _em(1, 50, depth=6),
    "HME, noise held, 16 experts": _em(1, 60, noise=0.3, held=60),
    "HME, noise held, 32 experts": _em(1, 50, depth=5, noise=0.3, held=27),
    "HME, noise held, 64 experts": _em(1, 50, depth=6, noise=0.3, held=27),
    "HME, noise held, 128 experts": _em(1, 50, depth=7, noise=0.3, held=27),
    "HME, on-line": _online(4, OnlineConfig()),
    "HME, on-line as published": _online(2, PUBLISHED_ONLINE),
    "HME, gradient": _gradient,
    "backprop, batch": _backprop(1 << 30, 0.05, 0.9, 3000, 25),
    FASTER_BACKPROP: _backprop(1 << 30, 0.2, 0.9, 3000, 25),
    "backprop, on-line": _backprop(1, 0.003, 0.2, 40, 1),
    "backprop, batches of 32": _backprop(32, 0.02, 0.9, 120, 1),
    "CART": _once(lambda seed: DecisionTreeRegressor(min_samples_leaf=5, random_state=seed)),
    "CART, linear leaves": _once(lambda seed: LinearTree(100, seed)),
    "MARS-like": _once(lambda seed: Splines()),
    "random forest": _once(lambda seed: RandomForestRegressor(100, random_state=seed)),
    "gradient boosting": _once(
        lambda seed: MultiOutputRegressor(HistGradientBoostingRegressor(max_iter=400, random_state=seed))
    ),
}


def _rows(x_ND: Floats, y_NO: Floats) -> Rows:
    return Rows(x_NP=np.column_stack([x_ND, np.ones(len(x_ND))]), y_NT=y_NO, weight_N=np.ones(len(x_ND)))


def _start(rows: Rows, seed: int, depth: int = 4, noise: float = 1.0) -> Mixture:
    """The paper's tree: binary, four levels, 16 experts."""
    family, random = Gaussian(targets=rows.y_NT.shape[1], noise_start=noise), np.random.default_rng(seed)
    return new_mixture(Tree.complete(depth, 2), family, rows.y_NT.T, rows.weight_N, rows.x_NP.shape[1], random)


def _predict(mixture: Mixture, x_ND: Floats) -> Floats:
    return mixture.mean(np.vstack([x_ND.T, np.ones(len(x_ND))])).T


def measure(name: str, seed: int) -> dict[str, Any]:
    """Relative error at the end of the best pass, and the first pass within 5 % of it."""
    x_ND, y_NO = (_standard(v) for v in robot_arm(seed))
    test_NO, started, path = y_NO[NUM_TRAIN:], time.process_time(), []
    for passes, guess_NO in MODELS[name](x_ND[:NUM_TRAIN], y_NO[:NUM_TRAIN], x_ND[NUM_TRAIN:], seed):
        left = float(((test_NO - guess_NO) ** 2).sum() / ((test_NO - test_NO.mean(axis=0)) ** 2).sum())
        path.append((passes, round(left, 5)))
    least = min(error for _, error in path)
    first = next(passes for passes, error in path if error <= 1.05 * least)
    seconds = time.process_time() - started
    return {"model": name, "seed": seed, "error": least, "passes": first, "path": path, "cpu_s": round(seconds, 2)}


def _standard(v_ND: Floats) -> Floats:
    return (v_ND - v_ND[:NUM_TRAIN].mean(axis=0)) / v_ND[:NUM_TRAIN].std(axis=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, help="Written anew after every run.")
    options = parser.parse_args()
    runs = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.models:
            runs.append(measure(name, seed))
            print("seed {seed} {model:34} {error:.4f} {passes:>5} passes {cpu_s} s".format(**runs[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps({**_found(runs), "runs": runs}) + "\n")
    print_table(runs)


def table(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean error with its standard error (None of one seed), median passes, by model."""
    found: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        own = [run for run in runs if run["model"] == name]
        error = np.array([run["error"] for run in own])
        found[name] = {
            "error": float(error.mean()),
            "standard_error": float(error.std(ddof=1) / len(error) ** 0.5) if len(error) > 1 else None,
            "passes": float(np.median([run["passes"] for run in own])),
            "seeds": len(own),
            "cpu_s": float(np.median([run["cpu_s"] for run in own])),
        }
    return found


def against_backprop(
    runs: list[dict[str, Any]], rival: str = "backprop, batch"
) -> dict[str, list[dict[str, float | None]]]:
    """For each HME and seed, in passes; None where it never comes to that.

    `to_backprop`: until within 10 % of the best error of `rival`, beside `backprop`, its passes to within 5 % of it;
    `own`: until within 5 % of its own best error, beside `backprop_to_own` to reach that error.
    """
    rivals = {run["seed"]: run for run in runs if run["model"] == rival}
    found: dict[str, list[dict[str, float | None]]] = {}
    for run in runs:
        other = rivals.get(run["seed"])
        if run["model"].startswith("HME") and other is not None:
            passes = {
                "to_backprop": first_pass(run, 1.1 * other["error"]), "backprop": other["passes"],
                "own": run["passes"], "backprop_to_own": first_pass(other, 1.05 * run["error"]),
            }  # fmt: skip
            found.setdefault(run["model"], []).append(passes)
    return found


def first_pass(run: dict[str, Any], error: float) -> int | None:
    """The first pass of `run` after which its error is at most `error`."""
    return next((passes for passes, reached in run["path"] if reached <= error), None)


def print_table(runs: list[dict[str, Any]]) -> None:
    """Ours and the paper's, side by side; the last line is JSON."""
    print(f"{'model':34} {'error':>7} {'s.e.':>7} {'passes':>7} {'CPU s':>7}   paper")
    for name, row in table(runs).items():
        spread = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        figures = f"{row['error']:7.4f} {spread:>7} {row['passes']:7.0f} {row['cpu_s']:7.1f}"
        print(f"{name:34} {figures}   {PUBLISHED.get(name) or ''}")
    print(json.dumps(_found(runs)))


def _found(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "table": table(runs),
        "against_backprop": against_backprop(runs),
        "against_faster_backprop": against_backprop(runs, FASTER_BACKPROP),
    }


if __name__ == "__main__":
    main()
