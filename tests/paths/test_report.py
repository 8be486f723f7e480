"""The report: one file that shows a run, however long, torn or empty it is."""

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from turnout.errors import ConfigError
from turnout.observe.metrics import encode
from turnout.observe.report import embed, page_data, write_report
from turnout.observe.run_folder import read_run
from turnout.observe.token_view import TokenView, write_token_view
from turnout.observe.trace import TraceHeader, TraceWriter

TEXT = """def read_lines(path):
    \"\"\"Every line of a file, without its line break.\"\"\"
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\\n") for line in file]

A railway switch sends each wagon down its own track; here, each token is sent to its experts."""


def synthetic_run(
    run: Path,
    *,
    steps: int = 1500,
    experts: tuple[int, ...] = (8, 8, 8, 8),
    sick: bool = False,
    seed: int = 0,
) -> Path:
    """A run folder as a training leaves it: plausible curves, and troubles of every kind when `sick`."""
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.toml").write_text('name = "tiny"\n\n[train]\nsteps = 1500\nlr = 3e-3\n')
    (run / "summary.json").write_text('{"params_total": 3240000, "params_active": 1130000}')
    header = TraceHeader(layers=tuple(f"blocks.{i}.moe" for i in range(len(experts))), num_experts=experts)
    trace = TraceWriter(run, header) if experts else None
    taste = [rng.normal(0, 0.5, e) for e in experts]
    with (run / "metrics.jsonl").open("wb") as lines:
        for step in range(1, steps + 1):
            part = step / steps
            loads = [_shares(t, part, sick, index) for index, t in enumerate(taste)]
            counts = [np.round(rng.multinomial(4096, share) * 2) for share in loads]
            if trace:
                flat = np.concatenate(counts).astype(np.int64)
                trace.append(step, flat, np.maximum(flat - 1800, 0) if sick else flat * 0)
            lines.write(encode(_step_line(rng, step, part, sick, counts)))
            if step % max(1, steps // 15) == 0:
                worse = 0.9 * max(0.0, part - 0.6) if sick else 0.0
                val = 2.1 + 2.2 * math.exp(-5 * part) + worse + rng.normal(0, 0.01)
                lines.write(encode(_place("eval", step) | {"val_loss": val}))
            if step % max(1, steps // 5) == 0:
                lines.write(encode({"kind": "event", "step": step, "text": f"saved checkpoints/step-{step}"}))
    if trace:
        trace.file.close()
        for at in (max(1, steps // 10), steps):
            write_token_view(run, _view(rng, at, header))
    return run


def _shares(taste: np.ndarray, part: float, sick: bool, layer: int) -> np.ndarray:
    logits = taste * (2.5 * math.exp(-6 * part) + 0.35)
    if sick and layer == 1:
        logits = logits + 3.0 * part * (np.arange(len(taste)) == 3)
        logits[-2:] -= 14 * part
    share = np.exp(logits - logits.max())
    return share / share.sum()


def _place(kind: str, step: int) -> dict[str, object]:
    return {"kind": kind, "step": step, "seconds": 0.29 * step, "tokens": 4096 * step}


def _step_line(rng, step: int, part: float, sick: bool, counts: list[np.ndarray]) -> dict[str, object]:
    loss = 2.0 + 2.3 * math.exp(-6 * part) + 6 * math.exp(-step / 12) + rng.normal(0, 0.06)
    if sick and step % 400 < 3 and step > 100:
        loss += 2.2
    line = _place("step", step) | {
        "loss": math.nan if sick and step == 700 else loss,
        "aux": {"load_balance": 1 + 0.4 * math.exp(-5 * part) + rng.normal(0, 0.01), "router_z": 3 + 2 * part},
        "total_loss": loss + 0.02,
        "lr": 3e-3 * min(1, step / 100) * (1 - 0.9 * part),
        "grad_norm": 0.8 + 3 * math.exp(-8 * part) + abs(rng.normal(0, 0.15)),
        "tokens_per_s": 14000 + rng.normal(0, 350) - (6000 if sick and part > 0.7 else 0),
    }
    loads = [c * len(c) / c.sum() for c in counts]
    if not loads:
        return line
    peak = [u.max() - 1 for u in loads]
    spread = [u.std() for u in loads]
    entropy = [-(u / len(u) * np.log(np.maximum(u, 1e-9) / len(u))).sum() / math.log(len(u)) for u in loads]
    drops = [float(np.maximum(c - 1800, 0).sum() / c.sum()) if sick else 0.0 for c in counts]
    return line | {
        "max_violation": float(np.mean(peak)),
        "max_violation_worst": float(max(peak)),
        "cv": float(np.mean(spread)),
        "cv_worst": float(max(spread)),
        "entropy": float(np.mean(entropy)),
        "entropy_worst": float(min(entropy)),
        "router_entropy": 0.97 - 0.4 * part,
        "dead_experts": int(sum((u < 0.001).sum() for u in loads)),
        "dead_experts_worst": int(max((u < 0.001).sum() for u in loads)),
        "dropped_share": float(np.mean(drops)),
        "dropped_share_worst": max(drops),
        "margin": 0.05 + 0.3 * part + rng.normal(0, 0.01),
        "margin_worst": 0.03 + 0.2 * part + rng.normal(0, 0.01),
    }


def _view(rng, step: int, header: TraceHeader) -> TokenView:
    pieces = re.findall(r"\s*\w+|\s*[^\w\s]+|\s+", TEXT)
    kind = [0 if p.strip().isalpha() else 1 if p.strip() else 2 for p in pieces]
    experts, weights = [], []
    for num in header.num_experts:
        home = rng.permutation(num)
        firsts = [int(home[(k * 3 + rng.integers(0, 2 + k)) % num]) for k in kind]
        experts.append([[first, (first + 1 + int(rng.integers(0, num - 1))) % num] for first in firsts])
        weights.append([[w, 1 - w] for w in rng.uniform(0.5, 0.95, len(pieces)).tolist()])
    return TokenView(step=step, tokens=pieces, layers=header.layers, experts=experts, weights=weights)
