"""On a device the mathematics is the same: torch says what numpy says, and all that is fitted is numpy's."""

import inspect
import pickle
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("sklearn")

import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from tests.hme.problems import random_problem, stirred
from turnout.errors import ConfigError
from turnout.hme import HMEClassifier, HMERegressor
from turnout.hme import rows as hme_rows
from turnout.hme.algebra import solve_symmetric
from turnout.hme.em import EMConfig, _stepped, fit_em
from turnout.hme.families import Softmax
from turnout.hme.gaussian import Gaussian
from turnout.hme.growth import worst_leaf
from turnout.hme.mixture import Mixture, new_mixture
from turnout.hme.rows import Rows
from turnout.hme.space import NUMPY, NumpySpace, space_for, space_of
from turnout.hme.sweep import loglik, sweep
from turnout.hme.torch_space import TorchSpace
from turnout.hme.tree import Tree
from turnout.hme.workspace import Workspace

HAS_CUDA = torch.cuda.is_available()
NO_CUDA = f"torch {torch.__version__} finds no CUDA device"
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason=NO_CUDA)]),
]
SOLVERS = [(1, 1), (1, 4), (2, 1), (2, 3)]  # algorithm, Newton steps


def _on(rows: Rows, device: str) -> Rows:
    return Rows(x_NP=rows.x_NP, y_NT=rows.y_NT, weight_N=rows.weight_N, work=Workspace(space_for(device)))


def _parts(mixture: Mixture) -> tuple[np.ndarray, ...]:
    return mixture.gate_GPO, mixture.experts.weight_LPO, mixture.experts.covariance_LOO


def _close(got: Any, want: Any) -> None:
    assert type(got) is np.ndarray
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("algorithm", "newton_steps"), SOLVERS)
@pytest.mark.parametrize("family", ["gaussian", "softmax", "poisson"])
def test_em_takes_the_same_steps(family: str, algorithm: Any, newton_steps: int, device: str) -> None:
    """Random trees (some with closed branches), weights, inputs, outputs; of Gaussian experts every noise."""
    noises = set()
    for seed in range(25):
        mixture, rows = random_problem(seed, family)
        mixture = stirred(mixture, seed)
        noises.add(getattr(mixture.family, "noise", None))
        config = EMConfig(algorithm=algorithm, max_iter=4, tol=0, newton_steps=newton_steps)
        want = fit_em(mixture, rows, config, keep_last=True)
        got = fit_em(mixture, _on(rows, device), config, keep_last=True)
        for there, here in zip(_parts(got.mixture), _parts(want.mixture), strict=True):
            _close(there, here)
        np.testing.assert_allclose(got.objective_path, want.objective_path, rtol=1e-9, atol=1e-9)
    assert noises == ({"unit", "scalar", "diagonal", "full"} if family == "gaussian" else {None})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("many_inputs", [0, 360])
def test_sums_are_those_of_one_block_however_rows_are_cut_and_kept(
    monkeypatch: pytest.MonkeyPatch, device: str, held: bool, many_inputs: int
) -> None:
    """Blocks kept with products, kept without them, and formed anew; products of pairs, or a model at a time."""
    random = np.random.default_rng(0)
    rows = Rows(x_NP=random.normal(size=(300, 3)), y_NT=random.normal(size=(300, 2)), weight_N=np.ones(300))
    family = Gaussian(targets=2, noise="full")
    mixture = stirred(new_mixture(Tree.complete(2, 3), family, rows.y_NT.T, rows.weight_N, 3, random), 0)
    want = sweep(rows, mixture)
    monkeypatch.setattr(hme_rows, "BLOCK_BYTES", 1)
    monkeypatch.setattr(hme_rows, "MANY_INPUTS", many_inputs)
    monkeypatch.setattr(TorchSpace, "block_bytes", lambda _, usual: usual)
    there = _on(rows, device)
    there.space.holds_rows = held
    try:
        monkeypatch.setattr(TorchSpace, "most_held_bytes", lambda *_: 8 * 300 * 6)  # no room for products
        kept = there.held_for(mixture)
    finally:
        there.space.holds_rows = device != "cpu"
    assert bool(kept.held) == (held or not many_inputs)
    assert len(list(kept.blocks(mixture))) == 3
    for _ in range(2):
        got = sweep(kept, mixture).on(NUMPY)
        _close(got.gates.information_MCQ, want.gates.information_MCQ)
        _close(got.experts.moments.gradient_MPO, want.experts.moments.gradient_MPO)
        _close(got.experts.square_LOO, want.experts.square_LOO)


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_lie_on_the_device_while_em_runs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array of a pass and of a step is a tensor there; what comes back is numpy's."""
    mixture, rows = random_problem(3, "gaussian")
    there, seen = _on(rows, device), []
    original = Mixture.posterior

    def posterior(self: Mixture, z_ZN: Any, make: Any = None) -> Any:
        seen.extend((z_ZN, self.gate_GPO, self.experts.weight_LPO, self.experts.covariance_LOO))
        found = original(self, z_ZN, make)
        seen.extend((found.leaf_LN, found.loglik_N))
        return found

    monkeypatch.setattr(Mixture, "posterior", posterior)
    fit = fit_em(mixture, there, EMConfig(max_iter=2, tol=0))
    assert len(seen) >= 18
    assert {(type(one), one.device.type, one.dtype) for one in seen} == {(torch.Tensor, device, torch.float64)}
    assert fit.sums is not None
    for array in (*_parts(fit.mixture), fit.sums.gates.information_MCQ, fit.sums.experts.square_LOO):
        assert type(array) is np.ndarray


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["gaussian", "softmax", "poisson"])
def test_likelihood_and_worst_leaf_are_the_same(family: str, device: str) -> None:
    for seed in range(10):
        mixture, rows = random_problem(seed, family)
        mixture, there = stirred(mixture, seed), _on(rows, device)
        assert loglik(there, mixture) == pytest.approx(loglik(rows, mixture), rel=1e-11)
        assert worst_leaf(mixture, there) == worst_leaf(mixture, rows)


@pytest.mark.parametrize("device", DEVICES)
def test_singular_systems_have_the_shortest_solution_there_too(device: str) -> None:
    random, space = np.random.default_rng(0), space_for(device)
    root_MPR = random.normal(size=(6, 5, 5))
    root_MPR[1, :, 3:] = 0  # of rank 3
    root_MPR[4] = 0
    a_MPP, b_MPO = root_MPR @ root_MPR.swapaxes(1, 2), random.normal(size=(6, 5, 2))
    b_MPO = a_MPP @ b_MPO
    got = solve_symmetric(space.asarray(a_MPP), space.asarray(b_MPO))
    assert space_of(got) is space
    np.testing.assert_allclose(NUMPY.asarray(got), solve_symmetric(a_MPP, b_MPO), rtol=1e-8, atol=1e-8)


def _table(num_rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(num_rows, 3)) * (1, 5, 0.1) + (0, 3, -2)
    return x_ND, np.abs(x_ND[:, 0]) * 3 + 0.5 * x_ND[:, 1] + 0.1 * random.normal(size=num_rows)


REGRESSORS = [
    {},
    {"noise": "full", "n_init": 2},
    {"noise": "diagonal", "solver": "least_squares"},
    {"noise": "unit", "branching": 3},
    {"noise_start": 0.3, "hold_noise": 4},
    {"depth": 0, "max_experts": 4},
    {"depth": 2, "prune": True},
    {"family": "poisson"},
    {"missing": "mean"},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", REGRESSORS)
def test_a_regressor_on_a_device_fits_and_predicts_as_numpy_does(settings: dict[str, Any], device: str) -> None:
    x_ND, y_N = _table()
    y = np.floor(np.maximum(y_N, 0)) if "family" in settings else np.column_stack([y_N, x_ND[:, 2]])
    if "missing" in settings:
        x_ND[::7, 1] = np.nan
    weight_N = np.random.default_rng(1).uniform(0.5, 2, len(x_ND))
    model = HMERegressor(**{"max_iter": 8, "tol": 0, "random_state": 0, **settings})
    here = clone(model).fit(x_ND, y, weight_N)
    there = clone(model).set_params(device=device).fit(x_ND, y, weight_N)
    assert there.mixture_.tree.num_leaves == here.mixture_.tree.num_leaves
    _close(there.predict(x_ND), here.predict(x_ND))
    _close(there.apply(x_ND), here.apply(x_ND))
    got, want = there.predict_dist(x_ND[:20]), here.predict_dist(x_ND[:20])
    _close(got.mean, want.mean)
    _close(got.variance, want.variance)
    _close(there.loglik_path_, here.loglik_path_)
    assert there.loglik_ == pytest.approx(here.loglik_, rel=1e-9)
    for array in (*_parts(there.mixture_), there.recursion_.expert_LCQ, there.recursion_.gate_GCQ):
        assert type(array) is np.ndarray


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("solver", ["em", "least_squares"])
def test_a_classifier_on_a_device_fits_and_predicts_as_numpy_does(classes: int, solver: Any, device: str) -> None:
    x_ND, y_N = _table()
    y_N = np.floor(y_N * 2).astype(int) % classes
    here = HMEClassifier(2, max_iter=8, tol=0, solver=solver, random_state=0).fit(x_ND, y_N)
    there = HMEClassifier(2, max_iter=8, tol=0, solver=solver, device=device, random_state=0).fit(x_ND, y_N)
    _close(there.predict_proba(x_ND), here.predict_proba(x_ND))
    np.testing.assert_array_equal(there.predict(x_ND), here.predict(x_ND))


@pytest.mark.parametrize("device", DEVICES)
def test_a_pickle_of_a_fit_has_no_tensor_and_predicts_the_same(device: str) -> None:
    x_ND, y_N = _table()
    fitted = HMERegressor(2, max_iter=5, device=device, random_state=0).fit(x_ND, y_N)
    written = pickle.dumps(fitted)
    assert b"torch" not in written
    again = pickle.loads(written)
    np.testing.assert_array_equal(again.predict(x_ND), fitted.predict(x_ND))
    _close(again.set_params(device=None).predict(x_ND), fitted.predict(x_ND))


@parametrize_with_checks(
    [
        HMERegressor(max_iter=15, device="cpu", random_state=0),
        HMEClassifier(max_iter=15, device="cpu", random_state=0),
    ]
)
def test_the_contract_of_scikit_learn_holds_on_a_device(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("solver", ["gradient", "online"])
def test_what_learns_a_few_rows_at_a_time_is_refused_on_a_device(solver: Any) -> None:
    x_ND, y_N = _table()
    with pytest.raises(ValueError, match=f"device='cpu' needs solver='em' or 'least_squares', not '{solver}'"):
        HMERegressor(solver=solver, device="cpu").fit(x_ND, y_N)


def test_partial_fit_is_numpys_and_goes_on_from_a_fit_on_a_device() -> None:
    x_ND, y_N = _table()
    here, there = HMERegressor(1, random_state=0).fit(x_ND, y_N), HMERegressor(1, device="cpu", random_state=0)
    there.fit(x_ND, y_N)
    assert not hasattr(there, "partial_fit")
    with pytest.raises(AttributeError) as refused:
        there.partial_fit(x_ND, y_N)
    assert "partial_fit learns by numpy alone, not on device='cpu': set_params(device=None)" in str(
        refused.value.__cause__
    )
    there.set_params(device=None).partial_fit(x_ND[:50], y_N[:50])
    _close(there.predict(x_ND), here.partial_fit(x_ND[:50], y_N[:50]).predict(x_ND))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu3", "device='tpu3' must be None"),
        ("mps", "device='mps' must be None .*float64"),
        ([1], r"device=\[1\] must be None"),
        pytest.param("cuda", "finds no CUDA device here", marks=pytest.mark.skipif(HAS_CUDA, reason="there is one")),
        pytest.param("cuda:99", "CUDA device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_and_nothing_is_fitted(device: Any, message: str) -> None:
    x_ND, y_N = _table()
    model = HMERegressor(device=device)
    with pytest.raises(ValueError, match=message):
        model.fit(x_ND, y_N)
    assert not hasattr(model, "mixture_")
    fitted = HMERegressor(max_iter=2, random_state=0).fit(x_ND, y_N).set_params(device=device)
    with pytest.raises(ValueError, match=message):
        fitted.predict(x_ND)


def test_without_torch_a_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert space_for(None) is NUMPY
    with pytest.raises(ConfigError, match="device='cpu' needs torch: pip install torch, or leave device at None"):
        space_for("cpu")


def test_both_spaces_have_the_same_names() -> None:
    """The type checker knows numpy's alone."""
    numpys = {name for name, _ in inspect.getmembers(NumpySpace) if not name.startswith("_")}
    torchs = {name for name, _ in inspect.getmembers(TorchSpace(torch.device("cpu"))) if not name.startswith("_")}
    assert torchs - {"device"} == numpys


@pytest.mark.parametrize("device", DEVICES)
def test_functions_that_differ_between_the_two_mean_the_same(device: str) -> None:
    space, random = space_for(device), np.random.default_rng(0)
    a, b = random.normal(size=(3, 4, 5)), random.normal(size=(3, 4, 5))
    for name, arrays in (("subtract", (1.0, a)), ("subtract", (a, b)), ("maximum", (a, b)), ("minimum", (a, 0.1))):
        moved = [space.asarray(x) if isinstance(x, np.ndarray) else x for x in arrays]
        _close(NUMPY.asarray(getattr(space, name)(*moved)), getattr(np, name)(*arrays))
    there = space.asarray(a)
    _close(NUMPY.asarray(space.max(there, axis=(1, 2))), a.max(axis=(1, 2)))
    _close(NUMPY.asarray(space.min(there, axis=1, keepdims=True)), a.min(axis=1, keepdims=True))
    _close(NUMPY.asarray(space.permuted(there, 2, 0, 1)), a.transpose(2, 0, 1))
    for array in (-np.abs(a), a, np.zeros((0, 3))):
        assert float(space.positive_max(space.asarray(array))) == NUMPY.positive_max(array)


@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("family", ["gaussian", "softmax", "poisson"])
def test_a_pass_and_a_step_stay_on_a_device_that_is_not_the_host(
    monkeypatch: pytest.MonkeyPatch, family: str, algorithm: Any
) -> None:
    """On torch's device without memory, which refuses sums of a tensor there and one of the host; no GPU is needed."""
    space, meta = TorchSpace(torch.device("meta")), {"device": "meta"}
    monkeypatch.setattr(TorchSpace, "block_bytes", lambda _, usual: usual)
    monkeypatch.setattr(TorchSpace, "asarray", lambda _, array: torch.empty(array.shape, dtype=torch.float64, **meta))
    for name, value in (("__bool__", True), ("__float__", 1.0), ("item", 1.0)):
        monkeypatch.setattr(torch.Tensor, name, lambda _, value=value: value)
    monkeypatch.setattr("turnout.hme.torch_space.on", lambda _: space)
    for seed in range(12):
        mixture, rows = random_problem(seed, family)
        rows = Rows(x_NP=rows.x_NP, y_NT=rows.y_NT, weight_N=rows.weight_N, work=Workspace(cast(NumpySpace, space)))
        tree, gate_G, leaf_L = mixture.tree.abreast()
        there = mixture.renumbered(tree, gate_G, leaf_L).on(rows.space)
        sums = sweep(rows, there, log_posteriors=algorithm == 2)
        stepped, _ = _stepped(there, rows, sums, EMConfig(algorithm=algorithm), enough=0.0)
        x_PN = rows.block(slice(0, 9)).x_PN
        for array in (*_parts(stepped), stepped.mean(x_PN), stepped.priors(x_PN), sums.gates.information_MCQ):
            assert isinstance(array, torch.Tensor)
            assert array.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason=NO_CUDA)
def test_rows_of_a_gpu_stay_there_from_pass_to_pass() -> None:
    random = np.random.default_rng(0)
    rows = Rows(
        x_NP=random.normal(size=(100_000, 21)), y_NT=np.eye(3)[random.integers(3, size=100_000)],
        weight_N=np.ones(100_000), work=Workspace(space_for("cuda")),
    )  # fmt: skip
    mixture = new_mixture(Tree.complete(3, 2), Softmax(targets=3), rows.y_NT.T, rows.weight_N, 21, random)
    held = rows.held_for(mixture)
    assert held.held
    assert len(held.held) < 20
    assert all(block.z_ZN.device.type == "cuda" for block in held.held)
