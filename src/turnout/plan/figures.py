"""What a picture of an answer shows, whoever draws it: `charts` into a file, `svg` into a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turnout.plan.collectives import Collective
from turnout.plan.layout import layout_text
from turnout.plan.memory import GIB, Memory
from turnout.plan.time import StepTime
from turnout.plan.waterfall import waterfall

if TYPE_CHECKING:
    # a search reads numpy
    from turnout.plan.search import Candidate

# colours that people who confuse red and green can tell apart: Wong 2011, Nature Methods 8:441
BLUE, SKY, GREEN, YELLOW, ORANGE, PINK, GREY = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#7b8290",
)  # fmt: skip
LEAST_SHARE = 1e-3  # a bar shorter than this share of the longest is no bar


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of a chart: one value for each series, end to end."""

    label: str
    values: tuple[float, ...]
    note: str = ""  # beside the bar
    start: float = 0.0  # where the first begins


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars, one below the other."""

    title: str
    unit: str  # of the axis
    series: tuple[str, ...]  # names of the values of a bar; one alone needs no legend
    colours: tuple[str, ...]
    rows: tuple[Bar, ...]
    limit: float = 0.0  # a line across; 0: none
    limit_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a chart."""

    x: float
    y: float
    label: str
    group: str  # points of a group have a colour
    mark: str = ""  # beside it; what it stands for is one of the notes


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points over two axes that both begin at 0."""

    title: str
    x: str
    y: str
    rows: tuple[Point, ...]
    notes: tuple[str, ...] = ()  # lines below

    @property
    def groups(self) -> tuple[str, ...]:
        """Their groups, in order of appearance."""
        return tuple(dict.fromkeys(point.group for point in self.rows))


Figure = Bars | Points
COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY)


# --- answers ---


def time_figure(step: StepTime) -> Bars:
    """The parts of a step, each starting where the one before it ends."""
    rows: list[Bar] = []
    start = 0.0
    for part in waterfall(step):
        values = (part.seconds, 0.0) if part.name == "compute" else (0.0, part.seconds)
        rows.append(
            Bar(label=part.name, values=(*values, 0.0), note=f"{part.seconds:.3g} s  {part.share:.0%}", start=start)
        )
        start += part.seconds
    rows.append(Bar(label="step", values=(0.0, 0.0, start), note=f"{start:.3g} s"))
    return Bars(
        title="One optimizer step on the slowest pipeline stage", unit="seconds",
        series=("computation", "all else", "step"), colours=(BLUE, ORANGE, GREY), rows=tuple(rows),
    )  # fmt: skip


def volume_figure(parts: Sequence[Collective], seconds: Sequence[float]) -> Bars:
    """Bytes of every collective inside the node and between nodes."""
    rows = [
        Bar(label=part.name, values=(part.intra_bytes / 1e9, part.inter_bytes / 1e9), note=f"{each:.3g} s")
        for part, each in zip(parts, seconds, strict=True)
    ]
    return Bars(
        title="What one device sends in a step, and the seconds of it alone", unit="GB",
        series=("inside the node", "between nodes"), colours=(BLUE, ORANGE), rows=tuple(rows),
    )  # fmt: skip


_MEMORY = (
    ("weights", "weights_bytes", BLUE), ("gradients", "gradients_bytes", SKY), ("optimizer", "optimizer_bytes", GREEN),
    ("activations", "activations_bytes", YELLOW), ("experts' rows", "moe_bytes", ORANGE),
    ("logits", "logits_bytes", PINK),
)  # fmt: skip


def memory_figure(stages: Sequence[tuple[str, Memory]], usable_bytes: float) -> Bars:
    """Memory of each (label, stage) by what needs it, before the line of what a device has for it."""
    rows = []
    for label, each in stages:
        named = [getattr(each, field) for _, field, _ in _MEMORY]
        values = (*named, each.allocated_bytes - sum(named))
        note = f"{each.allocated_bytes / GIB:,.1f}"
        rows.append(Bar(label=f"stage {label}", values=tuple(value / GIB for value in values), note=note))
    return Bars(
        title="Memory of one device by pipeline stage, at its peak", unit="GiB",
        series=(*(name for name, _, _ in _MEMORY), "buffers"), colours=(*(colour for _, _, colour in _MEMORY), GREY),
        rows=tuple(rows), limit=usable_bytes / GIB, limit_name="what a device has for it",
    )  # fmt: skip


def search_figure(front: Sequence["Candidate"]) -> Points:
    """The front of memory, time and dollars: what no other layout is as good as in all three."""
    # without a price dollars go as device time
    costs = [each.step_s * each.devices if each.usd_per_step is None else each.usd_per_step for each in front]
    firsts = {
        "fastest": min(range(len(front)), key=lambda i: front[i].step_s),
        "cheapest": min(range(len(front)), key=lambda i: costs[i]),
        "least memory": min(range(len(front)), key=lambda i: front[i].memory_gib),
    }
    marks = {row: letter for letter, row in zip("ABC", dict.fromkeys(firsts.values()), strict=False)}
    rows = tuple(
        Point(
            x=each.memory_gib, y=each.step_s, label=layout_text(each.strategy), mark=marks.get(i, ""),
            group=f"{each.devices:,} devices{_dollars(front, each.devices)}",
        )
        for i, each in enumerate(front)
    )  # fmt: skip
    best = {row: " and ".join(name for name, each in firsts.items() if each == row) for row in marks}
    return Points(
        title="What trades time for memory or money: no other layout is as good in all",
        x="GiB of the device that needs most", y="seconds of a step", rows=rows,
        notes=tuple(f"{marks[row]}  {best[row]}: {rows[row].label}" for row in marks),
    )  # fmt: skip


def _dollars(front: Sequence["Candidate"], devices: int) -> str:
    """What a step costs on so many devices, from the cheapest to the dearest."""
    prices = [each.usd_per_step for each in front if each.devices == devices and each.usd_per_step is not None]
    if not prices:
        return ""
    low, high = f"{min(prices):.3g}", f"{max(prices):.3g}"
    return f", ${low} a step" if low == high else f", ${low} to {high} a step"
