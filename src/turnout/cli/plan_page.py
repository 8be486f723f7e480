"""What a verb of `turnout plan` shows, kept for `--html`, and the files that `--plot` and `--html` ask for."""

from pathlib import Path
from typing import Any


class Shown:
    """A console that keeps what it prints."""

    def __init__(self, screen: Any) -> None:
        self.screen = screen
        self.shown: list[Any] = []

    def print(self, *what: Any, **how: Any) -> None:
        """As rich's console does."""
        self.screen.print(*what, **how)
        self.shown += what


def console(*, as_json: bool) -> Shown:
    """The console of a verb that has `--html`."""
    from turnout.cli.plan_print import wide_console

    return Shown(wide_console(as_json=as_json))


def write_pictures(
    shown: Shown, figure: Any, *, title: str, headline: str, plot: Path | None, page: Path | None
) -> None:
    """Draw the figure into `plot`, and it with all that was shown into `page`, where they are asked for.

    Raises: ConfigError if matplotlib is missing, or the plot's ending is not one it writes.
    """
    if plot:
        from turnout.plan.charts import draw

        draw(plot, figure, title=headline)
        shown.screen.print(f"  wrote {plot}")
    if page:
        from turnout.data.atomic import write_atomic
        from turnout.plan.answer_page import render

        # the headline is the page's first sentence
        rest = [each for each in map(_plain, shown.shown) if each and each != headline]
        write_atomic(page, render(title, headline, (figure,), rest).encode())
        shown.screen.print(f"  wrote {page} ({page.stat().st_size / 1024:.0f} KiB)")


def _plain(each: Any) -> Any:
    """A table of rich's, or a line, as a page has it."""
    from turnout.plan.answer_page import Grid

    if isinstance(each, str):
        return each.strip()
    columns = [list(column.cells) for column in each.columns]
    return Grid(
        title=str(each.title or ""),
        headings=tuple((str(column.header), str(column.justify)) for column in each.columns),
        rows=tuple(zip(*columns, strict=True)),
    )
