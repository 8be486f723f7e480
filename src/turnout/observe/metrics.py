"""`metrics.jsonl`: what a run wrote down, one JSON object per line.

    {"kind": "step", step, seconds, tokens, loss, aux: {name: value}, total_loss, lr, grad_norm, tokens_per_s,
     and, when the model has MoE layers, every field of `balance.Balance`; on several ranks sent: {intra_bytes,
     inter_bytes, intra_messages, inter_messages}, what the first one handed to its experts' ranks}
    {"kind": "eval", step, seconds, tokens, val_loss}
    {"kind": "event", step, text}

seconds: training clock; tokens: trained on so far; loss: main loss without auxiliary losses; aux: values before
their coefficients. null stands for a number that is NaN, infinite or not measured. Readers ignore keys and kinds
they do not know. Lines are ordered by step; a line that does not parse (torn by a kill) is skipped and counted.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnout.errors import ConfigError

METRICS_NAME = "metrics.jsonl"
_STEPS = range(2**53)  # what a page and a trace can hold exactly


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The lines of a run by kind, in order of step; of lines that repeat a step the last counts."""

    steps: tuple[Mapping[str, Any], ...]
    evals: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    num_damaged: int  # lines that do not parse; a last line still being written is not one


def encode(line: Mapping[str, Any]) -> bytes:
    """The line as strict JSON with its newline."""
    return json.dumps(_finite(line), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def read_metrics(run: Path) -> Metrics:
    """Everything in the run's `metrics.jsonl`.

    Raises: ConfigError if the folder has none.
    """
    path = run / METRICS_NAME
    if not path.is_file():
        raise ConfigError(
            f"{run} is not a run: it has no {METRICS_NAME}. A run is the folder that `turnout train RECIPE --out RUN` "
            "writes: recipe.toml, metrics.jsonl, trace/, checkpoints/"
        )
    by_kind: dict[str, list[Mapping[str, Any]]] = {"step": [], "eval": [], "event": []}
    num_damaged = 0
    for raw, line in _parse(path):
        if line is None:
            num_damaged += raw.endswith(b"\n")
        else:
            by_kind.get(line["kind"], []).append(line)
    return Metrics(
        steps=_latest(by_kind["step"]),
        evals=_latest(by_kind["eval"]),
        events=tuple(sorted(by_kind["event"], key=lambda line: line["step"])),
        num_damaged=num_damaged,
    )


def cut_metrics(run: Path, step: int) -> None:
    """Drop the lines after `step`, so that a run resumed there writes them once; all or nothing."""
    path = run / METRICS_NAME
    part = path.with_suffix(".part")
    with part.open("wb") as out:
        kept = (raw for raw, line in _parse(path) if line is not None and line["step"] <= step)
        out.writelines(raw.rstrip(b"\r\n") + b"\n" for raw in kept)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)


def _parse(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line as it stands in the file, with what it says; None for a line that says nothing."""
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            is_line = isinstance(line, dict) and isinstance(line.get("kind"), str) and is_step(line.get("step"))
            yield raw, line if is_line else None


def is_step(value: Any) -> bool:
    """Whether a value that was read can be the number of a step."""
    return type(value) is int and value in _STEPS


def _latest(lines: list[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    by_step = {line["step"]: line for line in lines}
    return tuple(by_step[step] for step in sorted(by_step))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
