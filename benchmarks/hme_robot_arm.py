"""The robot arm of Jordan & Jacobs 1994, regenerated: which acceleration follows from position, speed and torque.

Usage: python -m benchmarks.hme_robot_arm [--seeds 10] [--models NAME ...] [--out FILE]. Needs mujoco and scikit-learn.
Prints relative error (mean squared error over variance of the targets, on 5,000 rows of their own) and passes over the
data (the first pass whose error is within 5 % of the least, as in the paper), then one line of JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.tree import DecisionTreeRegressor

from benchmarks.hme_rivals import LinearTree, Splines
from turnout.hme.ascent import AscentConfig, fit_ascent
from turnout.hme.em import EMConfig, fit_em
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.online import OnlineConfig, Recursion, learn_rows
from turnout.hme.sweep import Rows
from turnout.hme.tree import Tree

ARM = """
<mujoco>
  <option gravity="0 0 -9.81"/>
  <default><joint damping="0.4" armature="0.02"/><geom type="capsule" size="0.05" density="1000"/></default>
  <worldbody>
    <body>
      <joint type="hinge" axis="0 0 1"/><geom fromto="0 0 0 0 0 0.3"/>
      <body pos="0 0 0.3">
        <joint type="hinge" axis="0 1 0"/><geom fromto="0 0 0 0.4 0 0"/>
        <body pos="0.4 0 0">
          <joint type="hinge" axis="0 1 0"/><geom fromto="0 0 0 0.35 0 0"/>
          <body pos="0.35 0 0"><joint type="hinge" axis="1 0 0"/><geom fromto="0 0 0 0.2 0.1 0"/></body>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
NUM_TRAIN, NUM_TEST = 15_000, 5_000


def robot_arm(seed: int, num_rows: int = NUM_TRAIN + NUM_TEST) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Forward dynamics of a four-joint arm in three dimensions.

    Shapes: (num_rows, 12) angles (rad), speeds (rad/s), torques (N m); (num_rows, 4) accelerations (rad/s^2).
    The paper gives neither lengths, masses nor ranges: only ratios between models can be compared with it.
    """
    import mujoco  # a dev dependency of this benchmark alone

    model = mujoco.MjModel.from_xml_string(ARM)
    state = mujoco.MjData(model)
    random = np.random.default_rng(seed)
    angle, speed = random.uniform(-np.pi / 2, np.pi / 2, (num_rows, 4)), random.uniform(-2, 2, (num_rows, 4))
    torque = random.uniform(-1, 1, (num_rows, 4)) * (20, 20, 10, 2)
    acceleration = np.empty((num_rows, 4))
    for row in range(num_rows):
        state.qpos[:], state.qvel[:], state.qfrc_applied[:] = angle[row], speed[row], torque[row]
        mujoco.mj_forward(model, state)
        acceleration[row] = state.qacc
    return np.hstack([angle, speed, torque]), acceleration


Floats = NDArray[np.float64]
Progress = Iterator[tuple[int, Floats]]  # passes so far, predictions for the test rows
PUBLISHED = {  # relative error, passes: Jordan & Jacobs 1994, tables 1 and 2
    "linear": (0.31, 1), "HME, algorithm 1": (0.10, 35), "HME, algorithm 2": (0.12, 39), "HME, on-line": (0.12, 2),
    "HME, gradient": (0.15, 104), "backprop, batch": (0.09, 5500), "backprop, on-line": (0.08, 63),
    "CART": (0.17, None),
    "CART, linear leaves": (0.13, None), "MARS-like": (0.16, None),
}  # fmt: skip


def _em(algorithm: int, iterations: int) -> Callable[..., Progress]:
    def run(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
        rows = _rows(x_ND, y_NO)
        mixture, passes = _start(rows, seed), 0
        config = EMConfig(algorithm=algorithm, max_iter=1, tol=0)
        for _ in range(iterations):
            sums = fit_em(mixture, rows, config, keep_last=True)
            mixture, passes = sums.mixture, passes + sums.passes - 1  # the last pass is the next iteration's first
            yield passes, _predict(mixture, test_ND)

    return run


def _online(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
    rows, random, config = _rows(x_ND, y_NO), np.random.default_rng(seed), OnlineConfig()
    state = Recursion.start(_start(rows, seed), config)
    for passes in range(1, 4):
        order_N = random.permutation(len(rows))
        state = learn_rows(state, replace(rows, x_NP=rows.x_NP[order_N], y_NT=rows.y_NT[order_N]), config)
        yield passes, _predict(state.mixture, test_ND)


def _gradient(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
    rows, random = _rows(x_ND, y_NO), np.random.default_rng(seed)
    mixture = _start(rows, seed)
    for passes in range(1, 61):
        mixture = fit_ascent(mixture, rows, AscentConfig(max_iter=1, tol=0), random, keep_last=True).mixture
        yield passes, _predict(mixture, test_ND)


def _backprop(batch_size: int, rate: float, momentum: float, passes: int, every: int) -> Callable[..., Progress]:
    def run(x_ND: Floats, y_NO: Floats, test_ND: Floats, seed: int) -> Progress:
        net = MLPRegressor(
            hidden_layer_sizes=(60,), activation="tanh", solver="sgd", learning_rate_init=rate, momentum=momentum,
            alpha=0.0, batch_size=min(batch_size, len(x_ND)), random_state=seed, nesterovs_momentum=False,
        )  # fmt: skip
        for done in range(1, passes + 1):
            net.partial_fit(x_ND, y_NO)
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
    "HME, on-line": _online,
    "HME, gradient": _gradient,
    "backprop, batch": _backprop(1 << 30, 0.05, 0.9, 3000, 25),
    "backprop, on-line": _backprop(1, 0.003, 0.2, 60, 1),
    "backprop, batches of 32": _backprop(32, 0.02, 0.9, 150, 1),
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


def _start(rows: Rows, seed: int) -> Mixture:
    """The paper's tree: binary, four levels, 16 experts."""
    family, random = Gaussian(targets=rows.y_NT.shape[1]), np.random.default_rng(seed)
    return new_mixture(Tree.complete(4, 2), family, rows.y_NT.T, rows.weight_N, rows.x_NP.shape[1], random)


def _predict(mixture: Mixture, x_ND: Floats) -> Floats:
    return mixture.mean(np.vstack([x_ND.T, np.ones(len(x_ND))])).T


def measure(name: str, seed: int) -> dict[str, float | int | str]:
    """Relative error at the end of the best pass, and the first pass within 5 % of it."""
    x_ND, y_NO = robot_arm(seed)
    x_ND, y_NO = (_standard(v) for v in (x_ND, y_NO))
    test_NO, started, path = y_NO[NUM_TRAIN:], time.process_time(), []
    for passes, guess_NO in MODELS[name](x_ND[:NUM_TRAIN], y_NO[:NUM_TRAIN], x_ND[NUM_TRAIN:], seed):
        path.append((passes, float(((test_NO - guess_NO) ** 2).sum() / ((test_NO - test_NO.mean(axis=0)) ** 2).sum())))
    least = min(error for _, error in path)
    first = next(passes for passes, error in path if error <= 1.05 * least)
    seconds = time.process_time() - started
    return {"model": name, "seed": seed, "error": least, "passes": first, "path": path, "cpu_s": round(seconds, 2)}


def _standard(v_ND: Floats) -> Floats:
    return (v_ND - v_ND[:NUM_TRAIN].mean(axis=0)) / v_ND[:NUM_TRAIN].std(axis=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        for name in options.models:
            rows.append(measure(name, seed))
            shown = rows[-1]
            print(
                f"seed {seed} {name:24} {shown['error']:.4f} {shown['passes']:>5} passes {shown['cpu_s']} s", flush=True
            )
            if options.out:
                options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_table(rows, options.models)


def print_table(rows: list[dict], names: list[str]) -> None:
    """Ours and the paper's, side by side; the last line is JSON."""
    print(f"{'model':24} {'error':>7} {'s.e.':>7} {'passes':>7}   paper")
    table = {}
    for name in names:
        error = np.array([row["error"] for row in rows if row["model"] == name])
        passes = float(np.median([row["passes"] for row in rows if row["model"] == name]))
        spread = float(error.std(ddof=1) / len(error) ** 0.5) if len(error) > 1 else float("nan")
        table[name] = {"error": float(error.mean()), "standard_error": spread, "passes": passes, "seeds": len(error)}
        paper = PUBLISHED.get(name)
        print(f"{name:24} {error.mean():7.4f} {spread:7.4f} {passes:7.0f}   {paper or ''}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
