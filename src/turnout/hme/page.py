"""`turnout fit-hme --report`: one self-contained page of a fitted tree; no script, no network."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnout.hme.base import HMEBase
from turnout.hme.text import placed
from turnout.hme.tree import CLOSED, Floats

MOST_DOTS = 1500  # of the scatter plot
MOST_BARS = 8  # inputs shown at a gate
PATH_HINT = "After each iteration, on the rows of the fit. The start, where all experts are alike, is left out."
TREE_HINT = (
    "Bars: the strongest weights of a gate, for inputs in units of their deviation; orange speaks for its left branch, "
    "blue against it; the name is that of the strongest. Discs: experts, and the share of the rows they answer for."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PageData:
    """What the page shows."""

    title: str
    sentence: str
    tiles: Sequence[tuple[str, str]]  # label, value
    loglik_path: Floats  # nats a row
    names: Sequence[str]
    text: str
    truth_N: NDArray[Any]  # of rows the fit never saw, where there are such
    guess_N: NDArray[Any]
    is_class: bool
    share_L: Floats  # mean responsibility of each expert
    where: str  # which rows were predicted


def render(data: PageData, estimator: HMEBase) -> str:
    """The page as HTML; every word of the data is escaped."""
    css = (files("turnout") / "observe" / "page" / "report.css").read_text(encoding="utf-8")
    tiles = "".join(
        f'<div class="tile"><div class="label">{_e(label)}</div><div class="value">{_e(value)}</div></div>'
        for label, value in data.tiles
    )
    parts = [
        _panel("Log-likelihood, nats a row", path_svg(data.loglik_path), PATH_HINT),
        _panel("The tree: what each gate weighs, how much each expert answers", tree_svg(data, estimator), TREE_HINT),
    ]
    if data.is_class:
        parts.append(_panel("Classes: true by predicted", confusion_table(data.truth_N, data.guess_N), data.where))
    else:
        parts.append(_panel("Predicted against true", scatter_svg(data.truth_N, data.guess_N), data.where))
    parts.append(_panel("In words", f"<pre>{_e(data.text)}</pre>"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_e(data.title)}</title><style>{css}\n{OWN_CSS}</style></head><body><main>"
        f'<div class="over">Hierarchical mixture of experts</div><h1>{_e(data.title)}</h1>'
        f'<p class="lead">{_e(data.sentence)}</p><div class="tiles">{tiles}</div>{"".join(parts)}</main></body></html>'
    )


OWN_CSS = """
.hme svg { width: 100%; height: auto; } .hme svg text { fill: var(--soft); font: 12px var(--sans); }
.hme .axis { stroke: var(--line); } .hme .curve { fill: none; stroke: var(--blue); stroke-width: 2; }
.hme .dot { fill: var(--blue); fill-opacity: 0.35; } .hme .branch { fill: none; stroke: var(--faint); }
.hme .up { fill: var(--orange); } .hme .down { fill: var(--blue); } .hme .leaf { fill: var(--green); }
.hme .wide { overflow-x: auto; }
.hme table { border-collapse: collapse; } .hme th { font-weight: 600; color: var(--soft); }
.hme th, .hme td { padding: 4px 14px; text-align: right; border-bottom: 1px solid var(--grid); }
.hme td.right { color: var(--green); font-weight: 620; }
.hme pre { overflow-x: auto; font: 12.5px/1.5 var(--mono); margin: 0; }
"""


def path_svg(path: Floats) -> str:
    """A curve over iterations; the first point, experts that are all alike, is left out where there are more."""
    shown = path[1:] if len(path) > 2 else path
    x, y = _places(np.arange(float(len(shown))), 60, 740), _places(-shown, 20, 200)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        '<svg viewBox="0 0 760 240" role="img" aria-label="Log-likelihood by iteration">'
        '<line class="axis" x1="60" y1="205" x2="740" y2="205"/>'
        f'<polyline class="curve" points="{line}"/>'
        f'<text x="52" y="{y.min() + 4:.0f}" text-anchor="end">{shown.max():.4g}</text>'
        f'<text x="52" y="{y.max() + 4:.0f}" text-anchor="end">{shown.min():.4g}</text>'
        f'<text x="740" y="226" text-anchor="end">iteration {len(path) - 1}</text></svg>'
    )


def scatter_svg(truth_N: Floats, guess_N: Floats) -> str:
    """Predicted against true values on one scale, with the diagonal."""
    stride = max(1, -(-len(truth_N) // MOST_DOTS))
    both = np.concatenate([truth_N[::stride], guess_N[::stride]])
    x, y = np.split(_places(both, 50, 390), 2)
    dots = "".join(f'<circle class="dot" cx="{a:.1f}" cy="{440 - b:.1f}" r="2.6"/>' for a, b in zip(x, y, strict=True))
    return (
        '<svg viewBox="0 0 440 420" style="max-width:520px" role="img" aria-label="Predicted against true">'
        f'<line class="axis" x1="50" y1="390" x2="390" y2="50"/>{dots}'
        f'<text x="50" y="412">true: {both.min():.3g} to {both.max():.3g}</text>'
        '<text x="8" y="40">predicted</text></svg>'
    )


def confusion_table(truth_N: NDArray[Any], guess_N: NDArray[Any]) -> str:
    """Rows by true class, columns by predicted class; the diagonal is right."""
    names = [str(name) for name in np.unique(np.concatenate([truth_N, guess_N]))]
    truth, guess = (np.searchsorted(names, np.asarray(side, dtype=str)) for side in (truth_N, guess_N))
    count_CC = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(count_CC, (truth, guess), 1)
    head = "".join(f"<th>{_e(name)}</th>" for name in names)
    lines = [f"<tr><th>true \\ predicted</th>{head}</tr>"]
    for row, name in enumerate(names):
        cells = "".join(
            f'<td class="right">{count}</td>' if row == column else f"<td>{count}</td>"
            for column, count in enumerate(count_CC[row])
        )
        lines.append(f"<tr><th>{_e(name)}</th>{cells}</tr>")
    return f'<div style="overflow-x:auto"><table>{"".join(lines)}</table></div>'


def tree_svg(data: PageData, estimator: HMEBase) -> str:
    """Gates as bars of their strongest weights by standardized input, leaves as discs of their share."""
    mixture = estimator.mixture_
    place, depth = placed(mixture.tree)
    wide, high = max(760, 96 * mixture.tree.num_leaves), 130 * (depth + 1)
    at = {
        node: (48 + (wide - 96) * (x + 0.5) / mixture.tree.num_leaves, 30 + 130 * y) for node, (x, y) in place.items()
    }
    marks = []
    for gate in range(mixture.tree.num_gates):
        for child in mixture.tree.child_GB[gate]:
            if child != CLOSED:
                (x, y), (u, v) = at[gate], at[int(child)]
                v = v - 22 if child >= 0 else v  # above the name of a gate
                curve = f"M{x:.0f} {y + 60:.0f}C{x:.0f} {v - 20:.0f} {u:.0f} {y + 80:.0f} {u:.0f} {v:.0f}"
                marks.append(f'<path class="branch" d="{curve}"/>')
        marks.append(_gate_bars(mixture.gate_GPO[gate, :, 0], data.names, *at[gate]))
    for leaf in range(mixture.tree.num_leaves):
        x, y = at[~leaf]
        radius = 4 + 40 * float(np.sqrt(data.share_L[leaf] / np.pi))
        marks.append(f'<circle class="leaf" cx="{x:.0f}" cy="{y + 20:.0f}" r="{radius:.1f}"/>')
        marks.append(f'<text x="{x:.0f}" y="{y + 66:.0f}" text-anchor="middle">{leaf}: {data.share_L[leaf]:.0%}</text>')
    # a wide tree is scrolled, not shrunk until its words are a few pixels high
    return (
        f'<div class="wide"><svg viewBox="0 0 {wide} {high}" style="min-width:{wide}px" role="img" '
        f'aria-label="The tree">{"".join(marks)}</svg></div>'
    )


def _gate_bars(weight_P: Floats, names: Sequence[str], x: float, y: float) -> str:
    """The strongest weights towards the gate's first branch: orange for, blue against."""
    strongest = np.argsort(-np.abs(weight_P[:-1]), kind="stable")[:MOST_BARS]
    top = max(float(np.abs(weight_P[strongest]).max(initial=0)), 1e-12)
    bars = []
    for i, d in enumerate(strongest):
        size = 26 * abs(float(weight_P[d])) / top
        left, up = x + 8 * (i - len(strongest) / 2), y + 28 - (size if weight_P[d] > 0 else 0)
        title = f"<title>{_e(names[d])}: {weight_P[d]:+.3g}</title>"
        side = "up" if weight_P[d] > 0 else "down"
        bars.append(f'<rect class="{side}" x="{left:.1f}" y="{up:.1f}" width="6" height="{size:.1f}">{title}</rect>')
    name = _e(names[strongest[0]]) if len(strongest) else ""
    return f'{"".join(bars)}<text x="{x:.0f}" y="{y - 6:.0f}" text-anchor="middle">{name}</text>'


def _places(values: Floats, low: float, high: float) -> Floats:
    span = float(values.max() - values.min()) or 1.0
    return low + (values - values.min()) / span * (high - low)


def _panel(title: str, body: str, hint: str = "") -> str:
    about = f'<p class="about">{_e(hint)}</p>' if hint else ""
    return f'<h2>{_e(title)}</h2>{about}<div class="panel hme">{body}</div>'


def _e(text: object) -> str:
    return html.escape(str(text))
