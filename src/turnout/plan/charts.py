"""Pictures of the planner's answers, with matplotlib where it is installed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from turnout.errors import ConfigError
from turnout.plan.explain import ExplainRow
from turnout.plan.figures import BLUE, COLOURS, GREY, LEAST_SHARE, ORANGE, Bars, Figure, Points


def draw(path: Path, figure: Figure, *, title: str) -> None:
    """Draw a figure into a file, under a title.

    Raises: ConfigError if matplotlib is missing, or the file's ending is not one it writes.
    """
    if isinstance(figure, Bars):
        _draw_bars(path, figure, title)
    else:
        _draw_points(path, figure, title)


def _draw_bars(path: Path, figure: Bars, title: str) -> None:
    drawn, axes = _figure(path, height=1.3 + 0.36 * len(figure.rows))
    longest = max([figure.limit, *(bar.start + sum(bar.values) for bar in figure.rows)])
    named: set[str] = set()
    for row, bar in enumerate(figure.rows):
        at = bar.start
        for name, value, colour in zip(figure.series, bar.values, figure.colours, strict=True):
            if value > LEAST_SHARE * longest:
                label = None if name in named else name
                axes.barh(row, value, left=at, color=colour, height=0.62, label=label)
                named.add(name)
            at += value
        _label(axes, at, row, bar.note)
    axes.set_yticks(range(len(figure.rows)), [bar.label for bar in figure.rows])
    axes.set_xlabel(f"{figure.unit}: {figure.title[0].lower()}{figure.title[1:]}")
    if figure.limit:
        axes.axvline(figure.limit, color=GREY, linestyle="--", label=f"{figure.limit_name}: {figure.limit:,.1f}")
    if len(figure.series) > 1:
        _legend(drawn, axes)
    _save(drawn, axes, path, title, longest=1.2 * longest)


def _draw_points(path: Path, figure: Points, title: str) -> None:
    drawn, axes = _figure(path, height=6.0)
    right, top = max(point.x for point in figure.rows), max(point.y for point in figure.rows)
    for group, colour in zip(figure.groups, COLOURS * len(figure.groups), strict=False):
        mine = [point for point in figure.rows if point.group == group]
        sizes = [70 if point.mark else 26 for point in mine]
        axes.scatter([p.x for p in mine], [p.y for p in mine], s=sizes, color=colour, label=group, zorder=3)
    for point in figure.rows:
        axes.annotate(point.mark, (point.x, point.y), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set_ylim(1.12 * top, 0)
    axes.set_xlabel("\n".join([figure.x, *figure.notes]), fontsize=9)
    axes.set_ylabel(figure.y)
    _legend(drawn, axes)
    _save(drawn, axes, path, title, longest=1.08 * right)


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


def _legend(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)


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
