"""The loop that the speed benchmark compares with is the same mathematics."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.hme_speed import RIDGE, loop_iteration, problem
from turnout.hme.em import EMConfig, fit_em


def test_the_loop_takes_the_same_step() -> None:
    mixture, rows = problem(2000, 5, 3, 2)
    mixture = fit_em(mixture, rows, EMConfig(max_iter=3, tol=0, ridge=RIDGE)).mixture
    ours = fit_em(mixture, rows, EMConfig(max_iter=1, tol=0, ridge=RIDGE)).mixture
    theirs = loop_iteration(mixture, rows)
    # ours puts a prior on the noise and hardly any ridge on the constant: alike, not equal
    np.testing.assert_allclose(ours.experts.weight_LPO, theirs.experts.weight_LPO, rtol=1e-3, atol=1e-4)
    moved = np.abs(ours.gate_GPO - mixture.gate_GPO).max(axis=(1, 2)) > 0
    same = np.isclose(ours.gate_GPO, theirs.gate_GPO, rtol=1e-2, atol=1e-2).all(axis=(1, 2))
    assert same[moved].mean() > 0.8
