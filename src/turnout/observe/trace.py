"""Writes `trace/counts.bin`, whose format `turnout.trace` describes and reads."""

import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turnout.errors import ConfigError
from turnout.observe.append import AppendFile
from turnout.trace import TRACE_NAME, Trace, TraceHeader, read_header, read_trace, records_of

__all__ = ["TRACE_NAME", "Trace", "TraceHeader", "TraceWriter", "cut_trace", "read_trace"]


class TraceWriter:
    """Appends records to a trace, which is begun if the run has none."""

    def __init__(self, run: Path, header: TraceHeader) -> None:
        path = run / TRACE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        is_begun = path.exists() and path.stat().st_size > 0
        self.file = AppendFile(path)
        if not is_begun:
            self.file.append(header.encode())

    def append(self, step: int, assigned: NDArray[np.integer], dropped: NDArray[np.integer]) -> None:
        """One record; the arrays hold the experts of all layers side by side."""
        self.file.append(struct.pack("<Q", step) + assigned.astype("<u4").tobytes() + dropped.astype("<u4").tobytes())


def cut_trace(run: Path, step: int, header: TraceHeader) -> None:
    """Drop the records after `step`, so that a run resumed there writes them once.

    Raises: ConfigError if the trace is of other layers than `header` names.
    """
    path = run / TRACE_NAME
    found, offset = read_header(path)
    if found != header:
        raise ConfigError(
            f"{path} holds {_shape(found)}; the model has {_shape(header)}. "
            "Resume with the recipe the run began with, or train into a new folder"
        )
    kept = int(np.searchsorted(records_of(path, found, offset)["step"], step, side="right"))
    os.truncate(path, offset + kept * found.record.itemsize)


def _shape(header: TraceHeader) -> str:
    return ", ".join(f"{name}: {n} experts" for name, n in zip(header.layers, header.num_experts, strict=True))
