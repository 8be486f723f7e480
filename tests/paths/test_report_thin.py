"""Long series in few numbers: what a chart needs is kept."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from turnout.observe.thin import bucket_edges, encode_load, smooth, thin


def test_series_keep_their_extremes_when_they_are_thinned() -> None:
    values = np.sin(np.arange(10_000.0))
    values[1234], values[77] = 50.0, math.nan
    kept = thin(values, bucket_edges(len(values), 100))
    assert len(kept["mean"]) == 100
    assert max(v for v in kept["hi"] if v is not None) == 50.0
    assert thin(np.array([math.nan, 1.0]), bucket_edges(2, 100)) == {"mean": [None, 1]}
    assert thin(np.zeros(0), bucket_edges(0, 100)) == {"mean": []}


def test_smoothing_keeps_a_constant_follows_a_line_and_skips_nan() -> None:
    assert np.allclose(smooth(np.full(300, 2.5)), 2.5)
    line = np.arange(400.0)
    assert np.allclose(smooth(line)[:380], line[:380])
    line[200] = math.nan
    assert np.isfinite(smooth(line)).all()


@given(load=st.lists(st.one_of(st.just(0.0), st.floats(0.001, 256)), min_size=1, max_size=40))
def test_the_codes_of_a_load_keep_three_digits_and_an_exact_zero(load: list[float]) -> None:
    codes = encode_load(np.array(load)).astype(float)
    back = np.where(codes == 0, 0, 2 ** ((codes - 1) / 2700 - 12))
    assert np.allclose(back, load, rtol=3e-4, atol=0)
