"""Numbers and tables of the planner as people read them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
WIDE = 150  # characters of a line where no terminal says how many there are
BAR = " ▏▎▍▌▋▊▉█"  # eighths of a character


def wide_console(*, as_json: bool) -> Any:
    """The console of a verb; into a file or a pipe tables are as wide as they need."""
    from turnout.cli.console import console

    screen = console(as_json=as_json)
    if not screen.is_terminal:
        screen.width = WIDE
    return screen


def gb(count: float) -> str:
    """Bytes as decimal gigabytes, as networks are sold."""
    return f"{count / 1e9:,.1f}" if count >= 0.05e9 else short(count / 1e9)


def gib(count: float) -> str:
    """Bytes as binary gigabytes, as allocators report them."""
    return f"{count / GIB:,.1f}" if count >= 0.05 * GIB else short(count / GIB)


def short(value: float) -> str:
    """Three significant digits; 0 is a dash, so that a table shows where nothing is."""
    if value == 0:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """A duration in the unit that leaves one to three digits before the point."""
    if value == 0:
        return "-"
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
    # 999.9 ms rounds to a second
    unit, size = next((each for each in units if value >= 0.9995 * each[1]), units[-1])
    number = value / size
    return f"{number:,.0f} {unit}" if number >= 999.5 else f"{f'{number:#.3g}'.rstrip('.')} {unit}"


def long_time(value: float) -> str:
    """A duration of hours or days."""
    return f"{value / 86_400:,.1f} days" if value >= 86_400 else f"{value / 3600:,.1f} hours"


def dollars(value: float | None) -> str:
    if value is None:
        return "unknown"
    if value >= 1e6:
        return f"${value / 1e6:,.2f} M"
    return f"${value:,.0f}" if value >= 100 else f"${f'{value:#.3g}'.rstrip('.')}"


def count(value: float) -> str:
    """A number of parameters or tokens."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{short(value / size)} {unit}"
    return short(value)


def percent(share: float | None, *, signed: bool = False) -> str:
    if share is None:
        return ""
    return f"{share:+.1%}" if signed else f"{share:.1%}"


def bar(share: float, width: int = 28) -> str:
    """A share as a bar of eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return BAR[-1] * full + (BAR[rest] if rest else "")


def write_csv(path: Path | None, rows: Sequence[dict[str, Any]], screen: Any) -> None:
    """Rows of plain values under the names of the first one, into the file that was asked for, if one was."""
    if path is None:
        return
    import csv
    import io

    from turnout.data.atomic import write_atomic

    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
    screen.print(f"  wrote {path}")


def columns(left: Iterable[str], right: Iterable[str]) -> dict[str, str]:
    """Headings for `console.table`: words first, then numbers."""
    return dict.fromkeys(left, "left") | dict.fromkeys(right, "right")
