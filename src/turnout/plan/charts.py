"""Pictures of the planner's answers, with matplotlib where it is installed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from turnout.errors import ConfigError
from turnout.plan.explain import ExplainRow
from turnout.plan.time import StepTime
from turnout.plan.waterfall import waterfall

# colours that people who confuse red and green can tell apart: Wong 2011, Nature Methods 8:441
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7b8290"


def draw_waterfall(path: Path, step: StepTime, *, title: str) -> None:
    """Draw the parts of a step, each starting where the one before it ends.

    Raises: ConfigError if matplotlib is missing, or the file's ending is not one it writes.
    """
    parts = waterfall(step)
    figure, axes = _figure(path, height=0.9 + 0.36 * (len(parts) + 1))
    start = 0.0
    for row, part in enumerate(parts):
        axes.barh(row, part.seconds, left=start, color=BLUE if part.name == "compute" else ORANGE, height=0.62)
        _label(axes, start + part.seconds, row, f"{part.seconds:.3g} s  {part.share:.0%}")
        start += part.seconds
    axes.barh(len(parts), start, color=GREY, height=0.62)
    _label(axes, start, len(parts), f"{start:.3g} s")
    axes.set_yticks(range(len(parts) + 1), [*(part.name for part in parts), "step"])
    axes.set_xlabel("seconds of one optimizer step")
    _save(figure, axes, path, title, longest=1.2 * start)


def draw_explain(path: Path, rows: Sequence[ExplainRow], *, title: str) -> None:
    """Draw bytes inside and between nodes of each scenario, with their ratio.

    Raises: ConfigError if matplotlib is missing, or the file's ending is not one it writes.
    """
    figure, axes = _figure(path, height=1.2 + 0.36 * len(rows))
    for i, row in enumerate(rows):
        axes.barh(i - 0.19, row.intra_bytes / 1e9, color=BLUE, height=0.36, label="inside nodes" if i == 0 else None)
        axes.barh(i + 0.19, row.inter_bytes / 1e9, color=ORANGE, height=0.36, label="between nodes" if i == 0 else None)
        _label(axes, max(row.intra_bytes, row.inter_bytes) / 1e9, i, f"{row.inter_over_intra:.2f}")
    axes.set_yticks(range(len(rows)), [row.scenario for row in rows])
    axes.set_xlabel("GB that one device sends in a step; beside the bars, bytes between nodes over bytes inside")
    axes.legend(frameon=False, loc="upper right")
    _save(figure, axes, path, title, longest=1.1 * max(max(r.intra_bytes, r.inter_bytes) for r in rows) / 1e9)


def _figure(path: Path, height: float) -> tuple[Any, Any]:
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{path} needs matplotlib, which is not installed: pip install 'turnout[plot]'")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, height), constrained_layout=True)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        pyplot.close(figure)
        raise ConfigError(f"{path} must end in one of: {', '.join(f'.{name}' for name in sorted(known))}")
    return figure, axes


def _label(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)


def _save(figure: Any, axes: Any, path: Path, title: str, *, longest: float) -> None:
    from matplotlib import pyplot

    axes.set_title(fill(title, 120), loc="left", fontsize=10)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, longest)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
