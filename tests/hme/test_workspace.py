"""Memory that all blocks share holds no result, and its arrays never overlap."""

import numpy as np
import pytest

from tests.hme.problems import random_problem, stirred
from turnout.hme.rows import Rows
from turnout.hme.space import CACHE_LINE, room
from turnout.hme.sweep import sweep
from turnout.hme.workspace import Workspace


def test_arrays_of_a_workspace_never_overlap_and_begin_at_cache_lines() -> None:
    work = Workspace()
    for _ in range(3):
        work.clear()
        arrays = [work.room(*shape) for shape in ((3, 5), (1, 1, 7), (4, 16), (2, 0), (9,))]
        for number, array in enumerate(arrays):
            array[...] = number
        for number, array in enumerate(arrays):
            assert (array == number).all()
            assert array.__array_interface__["data"][0] % (8 * CACHE_LINE) == 0 or not array.size
    assert np.shares_memory(arrays[0].base, arrays[-1])


def test_memory_asked_for_once_is_used_again() -> None:
    work = Workspace()
    work.clear()
    work.room(100)
    work.clear()
    first = work.room(4, 20)
    work.clear()
    assert np.shares_memory(work.room(80), first)
    assert room(2, 3).shape == (2, 3)


@pytest.mark.parametrize("seed", range(12))
def test_sums_outlast_the_sweeps_that_follow(seed: int) -> None:
    """A second sweep writes all of the workspace anew; blocks of another size make it grow in between."""
    mixture, rows = random_problem(seed)
    sums = sweep(rows, mixture)
    want = [part.copy() for part in _parts(sums)]
    sweep(rows, stirred(mixture, seed))
    for got, kept in zip(_parts(sums), want, strict=True):
        np.testing.assert_array_equal(got, kept)
    fresh = sweep(Rows(x_NP=rows.x_NP, y_NT=rows.y_NT, weight_N=rows.weight_N), mixture)
    for got, kept in zip(_parts(sweep(rows, mixture)), _parts(fresh), strict=True):
        np.testing.assert_allclose(got, kept, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("num_rows", "widest"), [(1, 91), (127, 91), (129, 10**6), (15_000, 91), (100_003, 1326)])
def test_parts_cover_all_rows_once_and_all_but_the_last_are_alike(num_rows: int, widest: int) -> None:
    rows = Rows(x_NP=np.zeros((num_rows, 2)), y_NT=np.zeros((num_rows, 1)), weight_N=np.ones(num_rows))
    sizes = [len(range(num_rows)[part]) for part in rows.parts(widest)]
    assert sum(sizes) == num_rows
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]
    assert len(sizes) == 1 or sizes[0] % CACHE_LINE == 0


def _parts(sums):
    experts = sums.experts
    return (
        sums.gates.gradient_MPO, sums.gates.information_MCQ, experts.moments.gradient_MPO,
        experts.moments.information_MCQ, experts.weight_L, experts.square_LOO,
    )  # fmt: skip
