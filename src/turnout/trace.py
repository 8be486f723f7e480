"""`trace/counts.bin`: how many assignments every expert got at every recorded step. An open format, version 1.

All integers are little-endian.

    bytes 0-7    b"TURNOUT\\x01", the last byte is the version
    bytes 8-11   uint32 H, length of the header
    H bytes      JSON, UTF-8: {"layers": [name], "num_experts": [int], "dtype": "uint32"}
    then records of equal size, with S = sum of num_experts; layers stand side by side in the order of the header:
                 uint64 step, uint32 assigned[S], uint32 dropped[S]

`assigned` counts every assignment the routers made in the step (all micro-batches), `dropped` those of them that
found no room at their expert; a choice the router left out by its own design is not among these. Steps increase
strictly. A record cut short by a kill ends the file and is not read.

Reading needs no torch, so that the planner can; `observe.trace` writes.

`trace/sources.jsonl`, of runs whose experts move, says from which ranks: each line is {"step": int, "layers": {name:
[[rows of each expert] of each rank]}}, the rows of a mean step since the line before, in a mean group of the ranks that
share the experts. A resumed run writes lines after its checkpoint anew; the last line of a step counts.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnout.errors import ConfigError

TRACE_NAME = "trace/counts.bin"
SOURCES_NAME = "trace/sources.jsonl"
MAGIC = b"TURNOUT"
VERSION = 1
MOST_EXPERTS = 2**24  # in all layers together: numpy's largest record is 2 GiB


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What the records of a trace mean."""

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]  # of each layer

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.num_experts):
            raise ConfigError(
                f"{len(self.layers)} layer names for {len(self.num_experts)} expert counts; give one of each per layer"
            )
        if any(number < 1 for number in self.num_experts) or sum(self.num_experts) > MOST_EXPERTS:
            raise ConfigError(f"num_experts={self.num_experts} must be at least 1 and {MOST_EXPERTS:,} in all layers")

    @property
    def record(self) -> np.dtype[np.void]:
        """One record, as numpy reads it."""
        columns = (sum(self.num_experts),)
        return np.dtype([("step", "<u8"), ("assigned", "<u4", columns), ("dropped", "<u4", columns)])

    def encode(self) -> bytes:
        """The bytes before the first record."""
        body = json.dumps(
            {"layers": self.layers, "num_experts": self.num_experts, "dtype": "uint32"}, separators=(",", ":")
        ).encode()
        return MAGIC + bytes([VERSION]) + struct.pack("<I", len(body)) + body


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace as arrays: one [steps, experts] array per layer, read from disk as they are used."""

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    steps: NDArray[np.uint64]
    counts: tuple[NDArray[np.uint32], ...]  # assignments made
    dropped: tuple[NDArray[np.uint32], ...]  # of these, for want of room


def read_trace(run: Path) -> Trace:
    """The expert counts of a run; without MoE layers or trace, a trace of no layers.

    Raises: ConfigError if the file is not a trace of a version this release reads.
    """
    path = run / TRACE_NAME
    if not path.exists() or path.stat().st_size == 0:
        return Trace(layers=(), num_experts=(), steps=np.zeros(0, np.uint64), counts=(), dropped=())
    header, offset = read_header(path)
    records = records_of(path, header, offset)
    cuts = np.cumsum(header.num_experts)[:-1]
    return Trace(
        layers=header.layers,
        num_experts=header.num_experts,
        steps=records["step"],
        counts=tuple(np.split(records["assigned"], cuts, axis=1)),
        dropped=tuple(np.split(records["dropped"], cuts, axis=1)),
    )


def read_sources(run: Path) -> dict[str, NDArray[np.float64]]:
    """By layer, the rows of a step from each rank to each expert, as last recorded; empty without such a record.

    Raises: ConfigError if the file is damaged before its last line.
    """
    path, last = run / SOURCES_NAME, ""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            # a kill can leave half a line at the end
            last = line if line.endswith("\n") else last
    try:
        layers = json.loads(last)["layers"] if last else {}
        return {name: np.asarray(rows, dtype=np.float64).reshape(len(rows), -1) for name, rows in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it to go on without it") from error


def records_of(path: Path, header: TraceHeader, offset: int) -> np.ndarray:
    """A view of the whole records on disk, after a header that ends at `offset`."""
    size = (path.stat().st_size - offset) // header.record.itemsize
    if size <= 0:
        return np.zeros(0, header.record)
    records = np.memmap(path, dtype=header.record, mode="r", offset=offset, shape=(size,))
    # a power cut can leave a tail of zeros: the record ends where steps stop rising
    rises = np.diff(records["step"].astype(np.int64)) > 0
    return records if rises.all() else records[: int(np.argmin(rises)) + 1]


def read_header(path: Path) -> tuple[TraceHeader, int]:
    """The header of a trace, and the offset of its first record.

    Raises: ConfigError if the file is not a trace of a version this release reads.
    """
    with path.open("rb") as file:
        start = file.read(12)
        if len(start) < 12 or start[:7] != MAGIC:
            raise ConfigError(f"{path} is not a trace of Turnout; delete it to go on without expert counts")
        if start[7] != VERSION:
            raise ConfigError(f"{path} has format version {start[7]}; this release reads version {VERSION}")
        (length,) = struct.unpack("<I", start[8:])
        body = file.read(min(length, os.fstat(file.fileno()).st_size))
    try:
        header = _decode(json.loads(body))
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise ConfigError(f"{path} has a damaged header ({error}); delete it to go on without expert counts") from error
    return header, 12 + len(body)


def _decode(fields: Any) -> TraceHeader:
    """Raises: ValueError, KeyError, TypeError or ConfigError where the fields are not those of a header."""
    layers, num_experts = fields["layers"], fields["num_experts"]
    if not (layers and all(type(name) is str for name in layers) and all(type(n) is int for n in num_experts)):
        raise ValueError("layers must be names, and num_experts whole numbers")
    return TraceHeader(layers=tuple(layers), num_experts=tuple(num_experts))
