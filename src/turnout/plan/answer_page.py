"""An answer of the planner as one HTML file: its pictures, then what the terminal shows. No script, no network."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from turnout.plan.figures import Figure
from turnout.plan.svg import svg_of


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of words."""

    title: str
    headings: tuple[tuple[str, str], ...]  # (words, left or right)
    rows: tuple[tuple[str, ...], ...]


def render(title: str, lead: str, figures: Sequence[Figure], shown: Sequence[Grid | str]) -> str:
    """The page: a heading, one sentence, the figures, then tables and lines in the order they were shown."""
    parts = [f"<figure><figcaption>{escape(each.title)}</figcaption>{svg_of(each)}</figure>" for each in figures]
    parts += [_grid(each) if isinstance(each, Grid) else f"<p>{escape(each)}</p>" for each in shown]
    folder = files("turnout.plan") / "page"
    words = {
        "title": escape(title), "lead": escape(lead), "body": "\n".join(parts),
        "style": (folder / "answer.css").read_text(encoding="utf-8"),
    }  # fmt: skip
    template = (folder / "answer.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: words[match[1]], template)


def _grid(grid: Grid) -> str:
    head = "".join(f'<th class="{side}" scope="col">{escape(words)}</th>' for words, side in grid.headings)
    sides = [side for _, side in grid.headings]
    rows = (
        "<tr>"
        + "".join(f'<td class="{side}">{_cell(cell)}</td>' for side, cell in zip(sides, row, strict=True))
        + "</tr>"
        for row in grid.rows
    )
    caption = f"<h2>{escape(grid.title)}</h2>" if grid.title else ""
    return (
        f'{caption}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell(words: str) -> str:
    """The words of a cell; a layout may go on in the next line after a comma."""
    return escape(words).replace(",", ",<wbr>") if "=" in words else escape(words)
