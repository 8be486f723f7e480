"""An iteration of ours beside one of each package of R and PyPI that fits mixtures of experts and is installed.

Same rows, as many experts, CPU seconds of one core; an iteration is the difference between a long and a short fit.
flexmix (R) and cgmm (PyPI): one softmax gate over linear experts with diagonal noise. mixtools (R): two experts, one
input, one output, all that `hmeEM` can do. neural-trees (PyPI): a tree of gates for two classes; an epoch of Adam in
float32 over its small networks beside an EM iteration of ours over logistic experts.
Run by `python -m benchmarks.hme_speed --packages`; needs `apt install r-cran-flexmix r-cran-mixtools` and
`pip install cgmm neural-trees`, or says what is absent.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.hme_problem import cpu_s, problem
from turnout.hme.em import EMConfig, fit_em
from turnout.hme.families import Family, Softmax
from turnout.hme.gaussian import Gaussian
from turnout.hme.mixture import new_mixture
from turnout.hme.rows import Rows
from turnout.hme.tree import Floats, Tree

NUM_ROWS = 15_000
SHORT, LONG = 2, 5  # iterations of the two fits
R_SCRIPT = Path(__file__).with_name("hme_packages.R")

Times = tuple[float, Floats] | str  # our seconds an iteration and theirs, turn by turn; or why there are none


def beside(names: list[str], turns: int) -> dict[str, float | str]:
    """Medians of `turns` for each package, or why it was skipped."""
    found: dict[str, float | str] = {}
    for name in names:
        times = PACKAGES[name](turns)
        if isinstance(times, str):
            found[name] = f"skipped: {times}"
            continue
        ours, theirs = times[0], float(np.median(times[1]))
        found |= {f"{name}_s": theirs, f"ours_beside_{name}_s": ours, f"times_faster_than_{name}": theirs / ours}
        found[f"{name}_version"] = _r_version(name) or version(name)
    return found


def _ours(tree: Tree, family: Family, rows: Rows, turns: int) -> float:
    start = new_mixture(tree, family, rows.y_NT.T, rows.weight_N, rows.x_NP.shape[1], np.random.default_rng(0))
    # ours takes milliseconds: more turns of a longer difference
    return float(np.median(_differences(lambda n: fit_em(start, rows, EMConfig(max_iter=n, tol=0)), 5 * turns)))


def _differences(fit: Callable[[int], object], turns: int) -> Floats:
    fit(1)
    pairs = [(cpu_s(lambda: fit(SHORT)), cpu_s(lambda: fit(LONG))) for _ in range(turns)]
    return np.array([(long - short) / (LONG - SHORT) for short, long in pairs])


def _rows(inputs: int, outputs: int) -> Rows:
    return problem(NUM_ROWS, inputs, 1, outputs)[1]


def _cgmm(turns: int) -> Times:
    if importlib.util.find_spec("cgmm") is None:
        return "cgmm is not installed (pip install cgmm)"
    from cgmm import MixtureOfExpertsRegressor

    rows = _rows(12, 4)

    def theirs(iterations: int) -> None:
        MixtureOfExpertsRegressor(
            16, covariance_type="diag", init_params="random", max_iter=iterations, tol=-np.inf, random_state=0
        ).fit(rows.x_NP[:, :-1], rows.y_NT)

    ours = _ours(Tree.complete(1, 16), Gaussian(targets=4, noise="diagonal"), rows, turns)
    return ours, _differences(theirs, turns)


def _neural_trees(turns: int) -> Times:
    if importlib.util.find_spec("neural_trees") is None:
        return "neural-trees is not installed (pip install neural-trees)"
    from neural_trees.mixture_of_experts import HierarchicalMixtureOfExperts

    rows = _rows(12, 1)
    is_high_N = rows.y_NT[:, 0] > np.median(rows.y_NT)
    rows = Rows(x_NP=rows.x_NP, y_NT=np.column_stack([is_high_N, ~is_high_N]).astype(float), weight_N=rows.weight_N)

    def theirs(epochs: int) -> None:
        HierarchicalMixtureOfExperts(
            depth=4, branching_factor=2, max_epochs=epochs, early_stopping=False, random_state=0, device="cpu"
        ).fit(rows.x_NP[:, :-1], is_high_N)

    return _ours(Tree.complete(4, 2), Softmax(targets=2), rows, turns), _differences(theirs, turns)


def _flexmix(turns: int) -> Times:
    rows = _rows(12, 4)
    # its first iteration takes half a minute: one turn
    theirs = _of_r("flexmix", rows, 16, 1, short=SHORT, long=LONG)
    if isinstance(theirs, str):
        return theirs
    return _ours(Tree.complete(1, 16), Gaussian(targets=4, noise="diagonal"), rows, turns), theirs


def _mixtools(turns: int) -> Times:
    rows = _rows(1, 1)
    theirs = _of_r("mixtools", rows, 2, turns, short=SHORT, long=LONG)
    return theirs if isinstance(theirs, str) else (_ours(Tree.complete(1, 2), Gaussian(targets=1), rows, turns), theirs)


def _of_r(package: str, rows: Rows, experts: int, turns: int, *, short: int, long: int) -> Floats | str:
    """Seconds an iteration of a package of R, turn by turn, or why there are none."""
    if shutil.which("Rscript") is None:
        return "Rscript is not on the path (apt install r-base-core)"
    if _r_version(package) is None:
        return f"R has no package {package} (apt install r-cran-{package})"
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.csv"
        np.savetxt(table, np.hstack([rows.x_NP[:, :-1], rows.y_NT]), delimiter=",")
        told = [package, table, rows.x_NP.shape[1] - 1, experts, turns, short, long]
        done = subprocess.run(["Rscript", R_SCRIPT, *map(str, told)], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{package} failed: {done.stderr.strip().splitlines()[-1:]}"
    return np.array(done.stdout.split()[-turns:], dtype=float)


def _r_version(package: str) -> str | None:
    """The version of a package of R that is installed."""
    if shutil.which("Rscript") is None:
        return None
    ask = f"cat(format(packageVersion('{package}')))"
    done = subprocess.run(["Rscript", "-e", ask], capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout


PACKAGES: dict[str, Callable[[int], Times]] = {
    "cgmm": _cgmm, "neural-trees": _neural_trees, "flexmix": _flexmix, "mixtools": _mixtools,
}  # fmt: skip
