"""`report.html`: one self-contained page that shows a run; no network, works from disk, e-mail and paper."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnout.data.atomic import write_atomic
from turnout.errors import ConfigError
from turnout.observe.advice import advise
from turnout.observe.headline import sentence, tiles
from turnout.observe.run_folder import RunRecord, aux_columns, column, number, read_run
from turnout.observe.run_summary import summarize
from turnout.observe.thin import bucket_edges, load_frames, short, smooth, thin
from turnout.observe.token_view import TokenView

_BUCKETS = 500  # points a chart gets
_TOKEN_NUMBERS = 60_000  # choices embedded for all token views together
_SERIES = (
    "loss",
    "tokens_per_s",
    "lr",
    "grad_norm",
    "max_violation",
    "max_violation_worst",
    "cv",
    "cv_worst",
    "entropy",
    "entropy_worst",
    "router_entropy",
    "dead_experts",
    "dead_experts_worst",
    "dropped_share",
    "dropped_share_worst",
    "declined_share",
    "declined_share_worst",
    "margin",
    "margin_worst",
)
_SCRIPTS = ("chart.js", "load.js", "tokens.js", "main.js")


def write_report(run: Path, out: Path) -> Path:
    """Write the page of a run to `out`, and return it.

    Raises: ConfigError if `run` is not a run folder, or `out` is a folder, a device or a file of the run's own.
    """
    _check_out(run, out)
    write_atomic(out, render(page_data(read_run(run))).encode())
    return out


def page_data(record: RunRecord) -> dict[str, Any]:
    """All that the page shows, as plain JSON values; under about 2 MB however long the run."""
    summary = summarize(record)
    edges = bucket_edges(len(record.metrics.steps), _BUCKETS)
    return {
        "name": record.name,
        "sentence": sentence(record),
        "tiles": [asdict(tile) for tile in tiles(record, summary)],
        "findings": [asdict(finding) for finding in advise(summary)],
        "notes": list(record.notes),
        "x": _axes(record, edges),
        "series": _series(record, edges),
        "aux": {name: thin(values, edges) for name, values in aux_columns(record.metrics).items()},
        "evals": _evals(record),
        "events": [[line["step"], _text(line.get("text"))] for line in record.metrics.events[-200:]],
        "routing": {"learns": record.routing.learns, "rule": record.routing.rule},
        "load": load_frames(record.trace) if len(record.trace.steps) else None,
        "tokens": _token_views(record.token_views),
        "recipe": record.recipe_text,
    }


def render(data: Mapping[str, Any]) -> str:
    """The page for this data. Nothing of the run becomes markup: data is inert JSON, shown as text only."""
    folder = files("turnout.observe") / "page"
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(str(data["name"])),
        "digest": digest,  # the page's policy runs this script and no other
        "style": (folder / "report.css").read_text(encoding="utf-8"),
        "data": embed(data),
        "script": script,
    }
    template = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def embed(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: no character of it can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _check_out(run: Path, out: Path) -> None:
    if not out.exists():
        return
    if not out.is_file():
        kind = "a folder" if out.is_dir() else "no plain file"
        raise ConfigError(f"{out} is {kind}; name the HTML file to write, such as {run / 'report.html'}")
    if out.resolve().is_relative_to(run.resolve()) and out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{out} is a file of the run; name an HTML file to write, such as {run / 'report.html'}")


def _axes(record: RunRecord, edges: NDArray[np.int64]) -> dict[str, list[float | None]]:
    last = edges[1:] - 1
    return {name: _exact(column(record.metrics, name)[last]) for name in ("step", "seconds", "tokens")}


def _series(record: RunRecord, edges: NDArray[np.int64]) -> dict[str, Any]:
    columns = {name: column(record.metrics, name) for name in _SERIES}
    columns["loss_smooth"] = smooth(columns["loss"])
    series = {name: thin(values, edges) for name, values in columns.items() if np.isfinite(values).any()}
    if "loss_smooth" in series:
        series["loss_smooth"] = {"mean": series["loss_smooth"]["mean"]}
    return series


def _evals(record: RunRecord) -> list[list[float | None]]:
    rows = [
        [number(line.get(name)) for name in ("step", "seconds", "tokens", "val_loss")] for line in record.metrics.evals
    ]
    stride = max(1, -(-len(rows) // _BUCKETS))
    return [_exact(np.array(row[:3])) + short(row[3:]) for row in rows[::-1][::stride][::-1]]


def _exact(values: NDArray[np.float64]) -> list[float | None]:
    rounded = [float(f"{value:.9g}") for value in values]  # which can take the largest floats to infinity
    return [value if math.isfinite(value) else None for value in rounded]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _token_views(views: tuple[TokenView, ...]) -> list[dict[str, Any]]:
    """The first and the last few views, cut so that all together stay small."""
    shown = views if len(views) <= 4 else (views[0], *views[-3:])
    return [_cut_view(view, _TOKEN_NUMBERS // len(shown)) for view in shown]


def _cut_view(view: TokenView, budget: int) -> dict[str, Any]:
    choices = max([len(token) for row in view.experts for token in row] or [1])
    keep = max(1, budget // max(1, choices * len(view.layers)))
    return {
        "step": view.step,
        "total": len(view.tokens),
        "tokens": [token[:200] for token in view.tokens[:keep]],
        "layers": list(view.layers),
        "experts": [row[:keep] for row in view.experts],
        "weights": [[short([number(w) for w in token]) for token in row[:keep]] for row in view.weights],
    }
