"""Everything a run folder says about its run, read once."""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnout.errors import ConfigError
from turnout.observe.metrics import METRICS_NAME, Metrics, read_metrics
from turnout.observe.routing import Routing, routing_of
from turnout.observe.token_view import TokenView, read_token_view, token_view_paths
from turnout.observe.trace import Trace, read_trace


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as it was written down. What is missing or broken is empty, and `notes` says why."""

    name: str  # of the recipe, else of the folder
    recipe_text: str
    routing: Routing
    summary: dict[str, Any]  # summary.json, as `turnout train --json` prints it
    metrics: Metrics
    trace: Trace
    token_views: tuple[TokenView, ...]
    notes: tuple[str, ...]


def read_run(run: Path) -> RunRecord:
    """The record of a run.

    Raises: ConfigError if the folder has no metrics.jsonl.
    """
    metrics = read_metrics(run)
    notes: list[str] = []
    if metrics.num_damaged:
        notes.append(f"damaged lines of {METRICS_NAME}, left out: {metrics.num_damaged:,}")
    recipe_text = _read_text(run / "recipe.toml", notes)
    recipe = _read_recipe(recipe_text, notes)
    return RunRecord(
        name=_name(recipe.get("name"), run),
        recipe_text=recipe_text,
        routing=_read_routing(recipe, notes),
        summary=_read_summary(run / "summary.json", notes),
        metrics=metrics,
        trace=_read_trace(run, notes),
        token_views=_read_token_views(run, notes),
        notes=tuple(notes),
    )


def column(metrics: Metrics, name: str) -> NDArray[np.float64]:
    """One field of all steps; NaN where it is missing or not a number."""
    values = [line.get(name) for line in metrics.steps]
    try:
        found = np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is not None and found.ndim == 1:  # lists of one length make a table
        return found
    return np.array([number(value) for value in values], dtype=np.float64)


def aux_columns(metrics: Metrics) -> dict[str, NDArray[np.float64]]:
    """Every auxiliary loss over all steps."""
    tables = [line.get("aux") if isinstance(line.get("aux"), dict) else {} for line in metrics.steps]
    names = sorted({str(name) for table in tables for name in table or {}})
    return {name: np.array([number((table or {}).get(name)) for table in tables]) for name in names}


def number(value: Any) -> float:
    """The value as a float; NaN if it is not a number, or too large for one."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _read_text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"{path.name} is missing")
        return ""


def _read_recipe(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        notes.append(f"recipe.toml does not parse: {error}")
        return {}


def _name(name: Any, run: Path) -> str:
    # a folder's name may hold bytes that are no text
    return name if isinstance(name, str) and name else run.resolve().name.encode(errors="replace").decode()


def _read_routing(recipe: dict[str, Any], notes: list[str]) -> Routing:
    try:
        return routing_of(recipe)
    except ConfigError as error:
        notes.append(f"the router of recipe.toml is not one of this release: {error}")
        return Routing()


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():  # a run that has not ended has none
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(summary, dict):
            return summary
        error = "not an object"
    except (OSError, ValueError, RecursionError) as caught:
        error = caught
    notes.append(f"{path.name} cannot be read: {error}")
    return {}


def _read_token_views(run: Path, notes: list[str]) -> tuple[TokenView, ...]:
    views = []
    for path in token_view_paths(run):
        try:
            views.append(read_token_view(path))
        except ConfigError as error:
            notes.append(str(error))
    return tuple(views)


def _read_trace(run: Path, notes: list[str]) -> Trace:
    try:
        return read_trace(run)
    except (ConfigError, OSError) as error:
        notes.append(str(error))
        return Trace(layers=(), num_experts=(), steps=np.zeros(0, np.uint64), counts=(), dropped=())
