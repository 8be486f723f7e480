"""The one writer of a run's record: metrics.jsonl, trace/ and the sinks asked for."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turnout.errors import ConfigError
from turnout.observe.append import AppendFile
from turnout.observe.balance import balance
from turnout.observe.metrics import METRICS_NAME, cut_metrics, encode
from turnout.observe.sinks import SINK_SCALARS, Sink, open_sinks, require_sinks
from turnout.observe.snapshot import Snapshot, take_snapshot
from turnout.observe.token_view import TokenView, cut_token_views, write_token_view
from turnout.observe.trace import TRACE_NAME, TraceHeader, TraceWriter, cut_trace
from turnout.tensors import MoEStats
from turnout.trace import SOURCES_NAME

_FLUSH_S = 1.0  # of the training clock: what a kill can lose, and how far a live page lags


class Recorder:
    """Writes down steps, evaluations, events and token views of one run, in order of step.

    One process per run writes: in a distributed run, rank 0, with statistics summed over ranks or its own.
    """

    def __init__(
        self,
        run: Path,
        layers: Sequence[str],
        num_experts: Sequence[int],
        every: int = 1,
        *,
        sinks: Sequence[str] = (),
    ) -> None:
        """Begin the record of a new run; `layers` names its MoE layers, `every` is the steps from one step
        record to the next.

        Raises: ConfigError if the folder has a record already, or a sink is unknown or not installed.
        """
        if (run / METRICS_NAME).exists():
            raise ConfigError(
                f"{run} already holds a run ({METRICS_NAME}); resume it with --resume {run}, or choose another --out"
            )
        self._open(run, TraceHeader(layers=tuple(layers), num_experts=tuple(num_experts)), every, sinks)

    @classmethod
    def resume(
        cls,
        run: Path,
        step: int,
        layers: Sequence[str],
        num_experts: Sequence[int],
        every: int = 1,
        *,
        sinks: Sequence[str] = (),
    ) -> "Recorder":
        """Go on with a run after `step`: what was recorded later is dropped, so nothing is there twice.

        Raises: ConfigError if the trace is of other layers, or a sink is unknown or not installed.
        """
        header = TraceHeader(layers=tuple(layers), num_experts=tuple(num_experts))
        require_sinks(sinks)
        if (run / TRACE_NAME).exists():
            cut_trace(run, step, header)
        if (run / METRICS_NAME).exists():
            cut_metrics(run, step)
        cut_token_views(run, step)
        recorder = cls.__new__(cls)
        recorder._open(run, header, every, sinks)
        return recorder

    def _open(self, run: Path, header: TraceHeader, every: int, sinks: Sequence[str]) -> None:
        if every < 1:
            raise ConfigError(f"every={every} must be at least 1 step")
        require_sinks(sinks)
        run.mkdir(parents=True, exist_ok=True)
        self.run, self.header, self.every = run, header, every
        self._sinks: tuple[Sink, ...] = open_sinks(sinks, run)
        self._trace = TraceWriter(run, header) if header.layers else None
        self._lines = AppendFile(run / METRICS_NAME)
        self._flushed_s = -math.inf

    def step(
        self,
        step: int,
        *,
        seconds: float,
        tokens: int,
        loss: float,
        total_loss: float,
        lr: float,
        grad_norm: float,
        tokens_per_s: float,
        aux: Mapping[str, float] | None = None,
        stats: Sequence[MoEStats] = (),
        sent: Mapping[str, float] | None = None,
    ) -> dict[str, Any] | None:
        """Record an optimizer step and return its line; None at steps that `every` leaves out.

        `seconds` is the training clock, `tokens` all tokens so far; `stats` holds one entry per MoE layer, for
        each micro-batch in turn, or sums of these; `sent` is what went to the ranks of other experts.
        """
        if step % self.every:
            return None
        line = {
            "kind": "step",
            "step": step,
            "seconds": round(seconds, 4),
            "tokens": tokens,
            "loss": loss,
            "aux": dict(aux or {}),
            "total_loss": total_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": round(tokens_per_s, 3),
        }
        if self.header.layers:
            snapshot = take_snapshot(stats, self.header.num_experts)
            line |= {name: _short(value) for name, value in asdict(balance(snapshot)).items()}
            self._append_counts(step, snapshot)
        if sent is not None:
            line["sent"] = dict(sent)
        self._write(line, seconds)
        return line

    def eval(self, step: int, *, seconds: float, tokens: int, val_loss: float) -> None:
        """Record an evaluation."""
        line = {"kind": "eval", "step": step, "seconds": round(seconds, 4), "tokens": tokens}
        self._write(line | {"val_loss": val_loss}, seconds)

    def event(self, step: int, text: str) -> None:
        """Record something worth reading later: a skipped step, a checkpoint, a restart."""
        self._write({"kind": "event", "step": step, "text": text}, math.inf)

    def sources(self, step: int, rows: Sequence[Sequence[Sequence[float]]]) -> None:
        """Record from which ranks rows came: of each layer, [rank][expert]."""
        line = {"step": step, "layers": dict(zip(self.header.layers, rows, strict=True))}
        with (self.run / SOURCES_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def token_view(
        self,
        step: int,
        tokens: Sequence[str],
        experts: Sequence[Sequence[Sequence[int]]],
        weights: Sequence[Sequence[Sequence[float]]],
    ) -> Path:
        """Write down where the tokens of one text went; `token_choices(assignment)` gives a layer's lists.

        Raises: ShapeError if a layer or token is missing.
        """
        view = TokenView(step=step, tokens=tokens, layers=self.header.layers, experts=experts, weights=weights)
        return write_token_view(self.run, view)

    def flush(self) -> None:
        """Hand everything recorded so far to the operating system."""
        self._lines.flush()
        if self._trace is not None:
            self._trace.file.flush()

    def close(self) -> None:
        """Flush and close files and sinks; closing twice does nothing."""
        self._lines.close()
        if self._trace is not None:
            self._trace.file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = ()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append_counts(self, step: int, snapshot: Snapshot) -> None:
        assert self._trace is not None
        self._trace.append(step, snapshot.assigned.sum(axis=0), snapshot.dropped.sum(axis=0))

    def _write(self, line: Mapping[str, Any], seconds: float) -> None:
        self._lines.append(encode(line))
        self._send(line)
        # a clock that went back (another machine) also flushes
        if not 0 <= seconds - self._flushed_s < _FLUSH_S:
            self.flush()
            self._flushed_s = seconds if math.isfinite(seconds) else self._flushed_s

    def _send(self, line: Mapping[str, Any]) -> None:
        scalars = {name: line[name] for name in SINK_SCALARS if name in line}
        for sink in self._sinks if scalars else ():
            try:
                sink.write(line["step"], scalars)
            except Exception as error:  # a dashboard that is down must not end a run
                warnings.warn(f"sink {type(sink).__name__} is off from here: {error}", stacklevel=4)
                self._sinks = tuple(other for other in self._sinks if other is not sink)


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
