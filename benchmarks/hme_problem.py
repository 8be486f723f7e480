"""The problem of the speed benchmarks: a smooth function with a fold, in memory or on disk."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.rows import Rows
from turnout.hme.tree import Floats, Tree


def problem(num_rows: int, inputs: int, depth: int, outputs: int, seed: int = 0) -> tuple[Mixture, Rows]:
    """A smooth function with a fold at random planes, and a mixture to fit to it."""
    random = np.random.default_rng(seed)
    x_NP, y_NO = np.empty((num_rows, inputs + 1)), np.empty((num_rows, outputs))
    _draw(x_NP, y_NO, random)
    return _mixture(Rows(x_NP=x_NP, y_NT=y_NO, weight_N=np.ones(num_rows)), depth, random)


def on_disk(folder: Path, num_rows: int, inputs: int, depth: int) -> tuple[Mixture, Rows]:
    """`problem` with one output, as memory maps of two files; no more than 10,000 rows are ever held."""
    random = np.random.default_rng(0)
    make = np.lib.format.open_memmap
    x_NP = make(folder / "x.npy", mode="w+", dtype=np.float64, shape=(num_rows, inputs + 1))
    y_NO = make(folder / "y.npy", mode="w+", dtype=np.float64, shape=(num_rows, 1))
    _draw(x_NP, y_NO, random)
    return _mixture(Rows(x_NP=x_NP, y_NT=y_NO, weight_N=np.ones(num_rows)), depth, random)


def _draw(x_NP: Floats, y_NO: Floats, random: np.random.Generator) -> None:
    fold_PO, slope_PO = random.normal(size=(2, x_NP.shape[1], y_NO.shape[1]))
    for start in range(0, len(x_NP), 10_000):
        x, y = x_NP[start : start + 10_000], y_NO[start : start + 10_000]
        x[:, :-1], x[:, -1] = random.normal(size=(len(x), x.shape[1] - 1)), 1
        y[:] = np.abs(x @ fold_PO) + x @ slope_PO + 0.1 * random.normal(size=y.shape)


def _mixture(rows: Rows, depth: int, random: np.random.Generator) -> tuple[Mixture, Rows]:
    family = Gaussian(targets=rows.y_NT.shape[1])
    tree, size = Tree.complete(depth, 2), rows.x_NP.shape[1]
    return new_mixture(tree, family, rows.y_NT.T, rows.weight_N, size, random), rows


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
