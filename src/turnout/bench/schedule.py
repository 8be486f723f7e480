"""`turnout bench tuner`: the tuner over a schedule of rows, against each static choice and the best of every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from turnout.bench.run import check_gate, result
from turnout.bench.schedule_case import ScheduleCase
from turnout.bench.started import check_lab, started
from turnout.tune import Dictionary, explain

TUNER = "tuner"
Step = Mapping[str, Any]  # level, taken, and seconds of the tuner and of each candidate


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Seconds of a whole schedule."""

    tuner: float
    oracle: float  # who knows the best candidate of every level
    static: Mapping[str, float]  # candidate -> everywhere the same

    def ratios(self) -> dict[str, float]:
        """The tuner over the oracle and over the best static choice, and the worst static one over the tuner."""
        return {
            "tuner_over_oracle": self.tuner / self.oracle,
            "tuner_over_best_static": self.tuner / min(self.static.values()),
            "worst_static_over_tuner": max(self.static.values()) / self.tuner,
        }


def run(case: ScheduleCase, out: Path | None = None) -> dict[str, Any]:
    """Times of the schedule, as `--json` prints them; `out`: where the tuner's dictionary is written.

    Raises: TurnoutError where a lab is asked for and this machine cannot have one, or a backend does not compute what
    the oracle computes; TransportError if the ranks fail.
    """
    check_lab(case.links, lab=case.lab)
    check_gate()
    found = started("turnout.bench.schedule_ranks", case.to_json(), lab=case.lab)
    last = found.get("then", found)
    if out is not None:
        out.write_text(last["dictionary"], encoding="utf-8")
    return result(
        **_said(case, found),
        then={"rate_mbit": case.then_mbit, **_said(case, last)} if "then" in found else None,
        layer={name: getattr(case, name) for name in ("dim", "hidden", "experts", "k", "etp", "ep")},
        schedule={name: getattr(case, name) for name in ("least", "swing", "levels", "hold", "periods")},
        mesh={"hosts": case.hosts, "ranks": case.ranks},
        links=vars(case.links) if case.lab else None,
    )


def _said(case: ScheduleCase, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of one measured schedule."""
    steps, dictionary = found["steps"], Dictionary.from_json(found["dictionary"], "the tuner's dictionary")
    totals, by_median = totals_of(steps, measured=True), totals_of(steps, measured=False)
    every = {TUNER: totals.tuner, **totals.static}
    return {
        "rows": [_row(name, seconds, totals, by_median) for name, seconds in every.items()],
        **totals.ratios(),
        "oracle_s": totals.oracle,
        "by_medians": by_median.ratios() | {"oracle_s": by_median.oracle, "tuner_s": by_median.tuner},
        "levels": _levels(case, steps),
        "steps": _steps(steps),
        "learning": found["learning"],
        "decisions": _decisions(dictionary),
    }


def totals_of(steps: Sequence[Step], *, measured: bool) -> Totals:
    """Of the times as they were measured, step by step; else every step at the median of its candidate and level.

    Medians say what the choices are worth: nothing that held one step up is in them. In either the oracle takes of each
    level the candidate of the least median.
    """
    medians = medians_of(steps)
    best = {level: min(times, key=times.__getitem__) for level, times in medians.items()}

    def of(step: Step, name: str) -> float:
        return step["seconds"][name] if measured else medians[step["level"]][name]

    candidates = [name for name in steps[0]["seconds"] if name != TUNER]
    return Totals(
        tuner=sum(step["seconds"][TUNER] if measured else of(step, step["taken"]) for step in steps),
        oracle=sum(of(step, best[step["level"]]) for step in steps),
        static={name: sum(of(step, name) for step in steps) for name in candidates},
    )


def medians_of(steps: Sequence[Step]) -> dict[int, dict[str, float]]:
    """Level -> candidate -> seconds."""
    by_level: dict[int, list[Step]] = {}
    for step in steps:
        by_level.setdefault(step["level"], []).append(step)
    return {
        level: {name: median(step["seconds"][name] for step in of_level) for name in of_level[0]["seconds"]}
        | {TUNER: float("inf")}
        for level, of_level in sorted(by_level.items())
    }


def _row(name: str, seconds: float, totals: Totals, by_median: Totals) -> dict[str, Any]:
    middle = by_median.tuner if name == TUNER else by_median.static[name]
    return {
        "case": TUNER,
        "mode": "train",
        "peer": name,
        "dtype": "float32",
        "threads": 1,
        "total_s": seconds,
        "over_oracle": seconds / totals.oracle,
        "over_oracle_by_medians": middle / by_median.oracle,
    }


def _levels(case: ScheduleCase, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """What is best at each level, and what the tuner took there."""
    found = []
    for level, times in medians_of(steps).items():
        order = sorted((name for name in times if name != TUNER), key=times.__getitem__)
        taken = [step["taken"] for step in steps if step["level"] == level]
        found.append(
            {
                "level": level,
                "rows_an_expert": case.tokens[level] * case.mesh.size * case.k / case.experts,
                "best": order[0],
                "best_ms": 1e3 * times[order[0]],
                "worst": order[-1],
                "worst_ms": 1e3 * times[order[-1]],
                "taken": {name: taken.count(name) for name in dict.fromkeys(taken)},
                "ms": {name: 1e3 * times[name] for name in order},
            }
        )
    return found


def _steps(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """One after another: what the tuner took and how long that was, and the best of the level in the same turn."""
    best = {level: min(times, key=times.__getitem__) for level, times in medians_of(steps).items()}
    return [
        {
            "level": step["level"],
            "taken": step["taken"],
            "ms": 1e3 * step["seconds"][TUNER],
            "best_ms": 1e3 * step["seconds"][best[step["level"]]],
        }
        for step in steps
    ]


def _decisions(dictionary: Dictionary) -> list[dict[str, Any]]:
    """The dictionary's answer for each key, and why: what `turnout tune --explain` prints first of it."""
    busy = dictionary.hardware.busy
    found = []
    for key, entry in sorted(dictionary.entries.items()):
        first = next(row for row in explain(entry, dictionary.rules, busy) if row.reason.startswith("taken"))
        said = {"choice": str(first.choice), "reason": first.reason, "searches": entry.searches}
        found.append({"capacity": key.capacity, "skew": key.skew} | said)
    return found
