"""Why a layout that a user names is not the pick: illegal, too large, or slower, by how much, where, and what helps."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from turnout.errors import ConfigError
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.job import Job
from turnout.plan.layout import layout_text
from turnout.plan.memory import GIB, Memory, beside_bytes, memory
from turnout.plan.query import Query
from turnout.plan.rank import TIE
from turnout.plan.space import SEARCHED, Space, as_listed
from turnout.plan.time import StepTime, step_time
from turnout.strategy import Strategy

if TYPE_CHECKING:
    from turnout.plan.evaluation import Evaluation

Kind = Literal["illegal", "memory", "slower", "outside", "pick"]
# a part of a step or of memory below this share of the whole is not worth a word
WORTH_NAMING = 0.01


@dataclass(frozen=True, kw_only=True)
class Change:
    """The fewest fields of a layout to change for a better one, and what it then takes."""

    fields: dict[str, tuple[Any, Any]]  # name -> (as it is, as it should be)
    step_s: float
    memory_gib: float

    def __str__(self) -> str:
        words = ", ".join(f"{name}={new} in place of {old}" for name, (old, new) in self.fields.items())
        return f"{words}: {self.step_s:.4g} s, {self.memory_gib:.1f} GiB"


@dataclass(frozen=True, kw_only=True)
class WhyNot:
    """The answer; what does not apply is empty."""

    kind: Kind
    text: str  # the whole answer in words
    stage: int | None = None  # the pipeline stage that needs most memory
    over_bytes: float = 0.0  # beyond the device, the context included
    needs_bytes: dict[str, float] | None = None  # of that stage, by cause, largest first
    step_s: float | None = None
    pick: Strategy | None = None  # what the search picks
    pick_step_s: float | None = None
    longer_s: dict[str, float] | None = None  # parts of the step that differ from the pick's, largest loss first
    better: Change | None = None  # the nearest layout that fits and is faster

    def to_json(self) -> dict[str, Any]:
        """As `plan search --why-not --json` prints it."""
        rows = {field.name: getattr(self, field.name) for field in fields(self)}
        pick = None if self.pick is None else layout_text(self.pick)
        return rows | {"pick": pick, "better": None if self.better is None else vars(self.better)}


def why_not(query: Query, strategy: Strategy, *, space: Space | None = None) -> WhyNot:
    """Why `strategy` is not what the search picks for `query`: one of five kinds of answer.

    Raises: ConfigError if the query itself is not legal.
    """
    world, machine = query.world, query.machine  # raise for a query that is not legal, whatever the layout
    try:
        job = query.with_strategy(as_listed(strategy, FRAMEWORKS[query.framework])).job()
        needs, step = memory(job), step_time(job, machine)
    except ConfigError as error:
        return WhyNot(kind="illegal", text=f"illegal on {world} devices: {error}")
    from turnout.plan.evaluation import evaluate

    found = evaluate(query, space)
    if not needs.fits(machine.device.memory_bytes):
        return _too_large(job, needs, step, found, machine.device.memory_bytes)
    return _slower(query, job, needs, step, found)


# --- too large ---


def _too_large(job: Job, needs: Memory, step: StepTime, found: "Evaluation", device_bytes: float) -> WhyNot:
    beside = beside_bytes(needs.allocated_bytes)
    over = needs.allocated_bytes + beside - device_bytes
    causes = _causes(needs)
    worth = [f"{name} {size / GIB:.1f}" for name, size in causes.items() if size > WORTH_NAMING * needs.allocated_bytes]
    better = nearest_better(job.strategy, found, float("inf"))
    sizes = f"{needs.allocated_bytes / GIB:.1f} GiB and {beside / GIB:.1f} beside"
    words = (
        f"does not fit: stage {needs.stage} of 0 to {job.strategy.pp - 1} needs {sizes}, {over / GIB:.1f} GiB more "
        f"than the device has; in GiB {', '.join(worth[:4])}"
    )
    return WhyNot(
        kind="memory",
        text=f"{words}; nearest that fits: {better}" if better else f"{words}; no layout fits",
        stage=needs.stage,
        over_bytes=over,
        needs_bytes=causes,
        step_s=step.step_s,
        better=better,
    )


def _causes(needs: Memory) -> dict[str, float]:
    sizes = {name.removesuffix("_bytes"): size for name, size in vars(needs).items() if name != "stage" and size}
    return dict(sorted(sizes.items(), key=lambda each: -each[1]))


# --- slower ---


def _slower(query: Query, job: Job, needs: Memory, step: StepTime, found: "Evaluation") -> WhyNot:
    from turnout.plan.evaluation import best_rows

    pick = next(iter(best_rows(found, "time", 1)), None)
    if pick is None:
        return WhyNot(kind="outside", text=f"fits; {_outside(query, job, found)}", step_s=step.step_s)
    best = step_time(found.layouts.job_of(pick), query.machine)
    strategy = found.layouts.strategy(pick)
    answer = {"step_s": step.step_s, "pick": strategy, "pick_step_s": best.step_s}
    ratio = step.step_s / best.step_s
    if ratio < 1 - TIE:
        text = f"{1 / ratio:.3f} times as fast as the pick, yet {_outside(query, job, found)}"
        return WhyNot(kind="outside", text=text, **answer)
    if ratio <= 1 + TIE:
        return WhyNot(kind="pick", text=_as_fast(job, strategy, needs, float(found.allocated_bytes[pick])), **answer)
    longer = _longer(step, best)
    where = ", ".join(f"{name} {s:+.3g} s" for name, s in longer.items() if abs(s) > WORTH_NAMING * best.step_s)
    better = nearest_better(job.strategy, found, step.step_s)
    return WhyNot(
        kind="slower",
        text=(
            f"{ratio:.3f} times the step of the pick, {step.step_s:.4g} s in place of {best.step_s:.4g}: "
            f"{where or 'a little everywhere'}; nearest better: {better}; the pick: {layout_text(strategy)}"
        ),
        longer_s=longer,
        better=better,
        **answer,
    )


def _as_fast(job: Job, pick: Strategy, needs: Memory, pick_bytes: float) -> str:
    changed = _differences(job.strategy, pick)
    if not changed:
        return "it is the pick"
    saved = (needs.allocated_bytes - pick_bytes) / GIB
    words = f"which needs {saved:.1f} GiB less" if saved > TIE else "which needs as much memory"
    return f"as fast as the pick, {words}: {', '.join(f'{name}={new}' for name, (_, new) in changed.items())}"


def _longer(step: StepTime, best: StepTime) -> dict[str, float]:
    """Seconds of each part beyond the pick's, largest loss first."""
    parts = {name.removesuffix("_s"): getattr(step, name) - getattr(best, name) for name in vars(step)}
    del parts["step"]
    return dict(sorted(((name, s) for name, s in parts.items() if s), key=lambda each: -each[1]))


def _outside(query: Query, job: Job, found: "Evaluation") -> str:
    """Which value of a layout the search does not try."""
    strategy = job.strategy
    for name in SEARCHED:
        options = found.layouts.options.get(name, [getattr(query.strategy, name)])
        if getattr(strategy, name) not in options:
            return f"{name}={getattr(strategy, name)!r} is not searched, of {name} only {sorted(map(str, options))}"
    return "the search does not try these values together"


# --- the nearest layout that is better ---


def nearest_better(strategy: Strategy, found: "Evaluation", step_s: float) -> Change | None:
    """The layout that fits, is faster than `step_s`, and differs in the fewest fields; of those the fastest."""
    from turnout.plan.evaluation import nearest_row

    layouts, row = found.layouts, nearest_row(found, strategy, step_s)
    if row is None:
        return None
    return Change(
        fields=_differences(strategy, layouts.strategy(row)),
        step_s=float(found.step_s[row]),
        memory_gib=float(found.allocated_bytes[row]) / GIB,
    )


def _differences(one: Strategy, other: Strategy) -> dict[str, tuple[Any, Any]]:
    return {
        name: (getattr(one, name), getattr(other, name))
        for name in SEARCHED
        if getattr(one, name) != getattr(other, name)
    }
