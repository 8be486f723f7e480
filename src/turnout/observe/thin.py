"""Long series in few numbers: neighbouring rows share a bucket that keeps their mean and extremes."""

import base64
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnout.observe.balance import load_over_fair
from turnout.observe.trace import Trace

# uint16 codes of a load u: 0 is no assignment at all, NO_TOKENS a layer that saw none, else on a log2 scale
# that keeps 0.03 % from 2^-12 to 2^12; load.js reads them
NO_TOKENS = 65535
_CODES_PER_OCTAVE = 2700
_OCTAVES = 12


def bucket_edges(num_rows: int, most: int) -> NDArray[np.int64]:
    """Row at which each bucket begins, and the number of rows at the end."""
    return np.linspace(0, num_rows, min(num_rows, most) + 1).astype(np.int64)


def thin(values: NDArray[np.float64], edges: NDArray[np.int64]) -> dict[str, list[float | None]]:
    """Mean of each bucket, with `lo` and `hi` when buckets hold several rows; None where nothing is finite."""
    starts = edges[:-1]
    if len(starts) == 0:
        return {"mean": []}
    is_finite = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(is_finite, values, 0.0), starts) / np.add.reduceat(
            is_finite, starts, dtype=np.int64
        )
    if len(starts) == len(values):
        return {"mean": short(mean)}
    lo = np.minimum.reduceat(np.where(is_finite, values, math.inf), starts)
    hi = np.maximum.reduceat(np.where(is_finite, values, -math.inf), starts)
    return {"mean": short(mean), "lo": short(lo), "hi": short(hi)}


def short(values: Sequence[float] | NDArray[np.float64]) -> list[float | None]:
    """Five digits are more than a chart shows; None for what is not finite."""
    # rounding can take the largest floats to infinity
    return [_plain(float(f"{value:.5g}")) for value in values]


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over about 4 % of the rows around each, near ones weighing more; rows that are not finite are passed over.

    The window is centred, so the curve does not lag; at the end it is cut short, at the beginning, where a loss
    falls steeply, it stays centred and shrinks.
    """
    # a moving mean of a moving mean has a tent for its window: a single high step leaves no plateau
    return _moving_mean(_moving_mean(values))


def _moving_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    num_rows = len(values)
    row = np.arange(num_rows)
    before = np.minimum(row, max(3, num_rows // 100))
    begin, end = row - before, np.minimum(num_rows, row + before + 1)
    is_finite = np.isfinite(values)
    running = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(is_finite)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (running[end] - running[begin]) / (count[end] - count[begin])


def load_frames(trace: Trace, most_numbers: int = 200_000) -> dict[str, Any]:
    """The trace as a film of at most 120 frames: load over fair share, each frame over its steps together."""
    columns = max(1, sum(trace.num_experts))
    edges = bucket_edges(len(trace.steps), min(120, max(8, most_numbers // columns)))
    codes = [encode_load(frame_load(trace, a, b)) for a, b in itertools.pairwise(edges.tolist())]
    return {
        "layers": list(trace.layers),
        "experts": list(trace.num_experts),
        "from": [int(trace.steps[row]) for row in edges[:-1]],
        "to": [int(trace.steps[row - 1]) for row in edges[1:]],
        "codes": base64.b64encode(b"".join(code.tobytes() for code in codes)).decode(),
    }


def frame_load(trace: Trace, begin: int, end: int) -> NDArray[np.float64]:
    """Load over fair share of every expert, layers side by side, in rows `begin` to `end` together."""
    totals = [counts[begin:end].sum(axis=0, dtype=np.int64) for counts in trace.counts]
    return load_over_fair(np.concatenate(totals), np.asarray(trace.num_experts, dtype=np.int64))


def encode_load(load: NDArray[np.float64]) -> NDArray[np.uint16]:
    """The codes of a frame."""
    with np.errstate(divide="ignore"):
        scaled = (np.log2(load) + _OCTAVES) * _CODES_PER_OCTAVE
    codes = 1 + np.clip(np.nan_to_num(scaled, neginf=0), 0, 2 * _OCTAVES * _CODES_PER_OCTAVE)
    return np.where(np.isnan(load), NO_TOKENS, np.where(load == 0, 0, np.round(codes))).astype("<u2")


def _plain(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else value
