"""The first lines of a report: what was trained, on how much, how long, how well."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnout.observe.run_folder import RunRecord, column, number
from turnout.observe.run_summary import RunSummary


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number of the headline."""

    label: str
    value: str
    detail: str = ""


def sentence(record: RunRecord) -> str:
    """The run in one sentence."""
    if not record.metrics.steps:
        return "No step has been recorded yet."
    last = record.metrics.steps[-1]
    text = f"{last['step']:,} steps on {quantity(number(last.get('tokens')))} tokens in "
    return text + f"{duration(number(last.get('seconds')))}. {_layers(record)}"


def tiles(record: RunRecord, summary: RunSummary) -> list[Tile]:
    """The headline's numbers; what was not measured is left out."""
    found = [_val_loss(summary), _train_loss(summary), _parameters(record.summary), _speed(record)]
    return [tile for tile in [*found, _balance(summary), _drops(summary)] if tile is not None]


def quantity(value: float) -> str:
    """1234567 -> 1.23 M."""
    if not math.isfinite(value):
        return "?"
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / min(size, 1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """3725 -> 1 h 2 min."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _layers(record: RunRecord) -> str:
    experts = record.trace.num_experts
    if not experts:
        return "No MoE layer was recorded."
    each = f"{experts[0]} experts" + (" each" if len(experts) > 1 else "")
    if len(set(experts)) > 1:
        each = f"{min(experts)} to {max(experts)} experts"
    return f"{len(experts)} MoE layer{'s' if len(experts) > 1 else ''} of {each}."


def _val_loss(summary: RunSummary) -> Tile | None:
    if not summary.evals:
        return None
    best_step, best = min(summary.evals, key=lambda pair: pair[1])
    last_step, last = summary.evals[-1]
    detail = f"perplexity {math.exp(last):,.1f}" if last < 20 else f"step {last_step:,}"
    if best < last:
        detail = f"best {best:.3f} at step {best_step:,}"
    return Tile(label="Validation loss", value=f"{last:.3f}", detail=detail)


def _train_loss(summary: RunSummary) -> Tile | None:
    if not math.isfinite(summary.loss_last):
        return None
    return Tile(
        label="Training loss", value=f"{summary.loss_last:.3f}", detail=f"smoothed, from {summary.loss_first:.3f}"
    )


def _parameters(summary: Mapping[str, Any]) -> Tile | None:
    total, active = number(summary.get("params_total")), number(summary.get("params_active"))
    if not math.isfinite(total):
        return None
    detail = f"{quantity(active)} active per token" if math.isfinite(active) else ""
    return Tile(label="Parameters", value=quantity(total), detail=detail)


def _speed(record: RunRecord) -> Tile | None:
    speed = column(record.metrics, "tokens_per_s")
    speed = speed[np.isfinite(speed)]
    if not speed.size:
        return None
    return Tile(label="Speed", value=quantity(float(np.median(speed))), detail="tokens per second, median")


def _balance(summary: RunSummary) -> Tile | None:
    if not summary.layers:
        return None
    worst = max(summary.layers, key=lambda layer: layer.max_load)
    return Tile(
        label="Busiest expert",
        value=f"{worst.max_load:.2f} \N{MULTIPLICATION SIGN}",
        detail="the fair share, at the end",
    )


def _drops(summary: RunSummary) -> Tile | None:
    if not summary.layers:
        return None
    dead = sum(len(layer.dead) for layer in summary.layers)
    total = sum(len(layer.load) for layer in summary.layers)
    return Tile(label="Experts in use", value=f"{total - dead} / {total}", detail="over the last tenth of the run")
