"""Figures as SVG, for pages that need no program to be read and no network."""

from html import escape
from math import floor, log10

from turnout.plan.figures import COLOURS, LEAST_SHARE, Bars, Figure, Points

WIDTH, NOTES, ROW = 960, 110, 26  # of the picture, of words right of the bars, of a bar
LETTER, LABELS = 7.5, 190  # of a letter left of the bars, and of all of them at most
PLOT_HEIGHT = 420


def svg_of(figure: Figure) -> str:
    """The figure as one element, drawn in the colours of the page it is on."""
    return _bars(figure) if isinstance(figure, Bars) else _points(figure)


def ticks(longest: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to `longest`, at most `most` steps apart."""
    if longest <= 0:
        return [0.0]
    rough = longest / most
    unit = 10.0 ** floor(log10(rough))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= rough * (1 - 1e-9))
    return [i * step for i in range(int(longest / step + 1e-9) + 1)]


# --- bars ---


def _bars(figure: Bars) -> str:
    longest = max([figure.limit, *(bar.start + sum(bar.values) for bar in figure.rows)], default=0.0) or 1.0
    left = min(LABELS, 16 + LETTER * max((len(bar.label) for bar in figure.rows), default=0))
    scale, bottom = (WIDTH - left - NOTES) / longest, ROW * len(figure.rows) + 8
    parts = [_axis(left + tick * scale, bottom, f"{tick:g}") for tick in ticks(longest)]
    for row, bar in enumerate(figure.rows):
        at, top = bar.start, ROW * row + 4
        parts.append(_text(left - 8, top + 15, bar.label, "end"))
        for name, value, colour in zip(figure.series, bar.values, figure.colours, strict=True):
            if value > LEAST_SHARE * longest:
                box = f'x="{left + at * scale:.1f}" y="{top}" width="{value * scale:.1f}" height="{ROW - 8}"'
                parts.append(
                    f'<rect {box} fill="{colour}">{_title(f"{bar.label}: {name} {value:.3g} {figure.unit}")}</rect>'
                )
            at += value
        parts.append(_text(left + at * scale + 6, top + 15, bar.note, kind="note"))
    if figure.limit:
        x = left + figure.limit * scale
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 34, f"{figure.limit_name}: {figure.limit:,.1f} {figure.unit}", "end", "note"))
    parts.append(_text(left, bottom + 34, figure.unit, kind="note"))
    legend = _legend(list(zip(figure.series, figure.colours, strict=True))) if len(figure.series) > 1 else ""
    return legend + _picture(figure.title, bottom + 42, parts)


# --- points ---


def _points(figure: Points) -> str:
    right, top = max(point.x for point in figure.rows) or 1.0, max(point.y for point in figure.rows) or 1.0
    left, width, height = 64, WIDTH - 64 - 20, PLOT_HEIGHT
    across, up = width / (1.08 * right), height / (1.08 * top)
    parts = [_axis(left + tick * across, height, f"{tick:g}") for tick in ticks(right)]
    for tick in ticks(top):
        y = height - tick * up
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:g}", "end", "note"))
    colours = dict(zip(figure.groups, COLOURS * len(figure.groups), strict=False))
    for point in figure.rows:
        x, y = left + point.x * across, height - point.y * up
        words = f"{point.label}: {point.y:.4g} s, {point.x:,.1f} GiB; {point.group}"
        radius = 6 if point.mark else 4
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colours[point.group]}">{_title(words)}</circle>'
        )
        parts.append(_text(x, y - 10, point.mark, "middle"))
    parts.append(_text(left, height + 34, f"{figure.x}; upwards: {figure.y}", kind="note"))
    notes = "".join(f"<p>{escape(note)}</p>" for note in figure.notes)
    return _legend(list(colours.items())) + _picture(figure.title, height + 42, parts) + notes


# --- pieces ---


def _picture(title: str, height: float, parts: list[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}"'
    return f'<div class="drawing"><svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg></div>'


def _axis(x: float, bottom: float, words: str) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
    return line + _text(x, bottom + 16, words, "middle", "note")


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>"


def _legend(named: list[tuple[str, str]]) -> str:
    keys = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in named)
    return f'<p class="legend">{"".join(keys)}</p>'
