"""`turnout bench overlap`: a layer's step in chunks, against its exchanges alone and its experts alone, in one run."""

from typing import Any

from turnout.bench.overlap_case import OverlapCase
from turnout.bench.race import Timing, ratio
from turnout.bench.run import check_gate, ratio_keys, result, row
from turnout.bench.started import check_lab, started
from turnout.tune import Choice, Dictionary, explain
from turnout.tune.choice import WINDOW

PARTS = ("step", "exchanges", "experts")


def run(case: OverlapCase) -> dict[str, Any]:
    """Times of every number of chunks, and what the tuner takes, as `--json` prints them.

    Raises: TurnoutError where a lab is asked for and this machine cannot have one, or a backend does not compute what
    the oracle computes; TransportError if the ranks fail.
    """
    check_lab(case.links, lab=case.lab)
    check_gate()
    found = started("turnout.bench.overlap_ranks", case.to_json(), lab=case.lab)
    rows = [each for mode in case.modes for each in _rows(mode, case, found["seconds"])]
    return result(
        rows,
        best=[_best(mode, rows) for mode in case.modes],
        tuner=_tuner(found["dictionary"]) if case.tune else None,
        layer={name: getattr(case, name) for name in ("tokens", "dim", "hidden", "experts", "k")},
        mesh={"hosts": case.hosts, "ranks": case.ranks, "rounds": case.rounds},
        links=vars(case.links) if case.lab else None,
    )


def _rows(mode: str, case: OverlapCase, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One for each number of chunks and each of PARTS."""
    timings = {key: Timing(ms=tuple(1e3 * each for each in of_rounds)) for key, of_rounds in seconds.items()}
    rows = []
    for chunks in case.chunks:
        step, exchanges, experts = (timings[f"{mode} {chunks} {part}"] for part in PARTS)
        # uncut, both are at their shortest: what chunks add to either counts as the step's own
        whole = [timings[f"{mode} 1 {part}"] for part in PARTS[1:]]
        of_step = {
            **ratio_keys("step_over_longer", ratio(step, _longer(exchanges, experts))),
            **ratio_keys("step_over_longer_uncut", ratio(step, _longer(*whole))),
            **ratio_keys("sum_over_step", ratio(_sum(exchanges, experts), step)),
            **ratio_keys("speedup_over_uncut", ratio(timings[f"{mode} 1 step"], step)),
            "step_over_longer_uncut_of_minima": min(step.ms) / max(min(each.ms) for each in whole),
        }
        for part, timing in zip(PARTS, (step, exchanges, experts), strict=True):
            own = {"mode": mode, "threads": 1, "chunks": chunks}
            rows.append(row("overlap", part, timing) | own | (of_step if part == "step" else {}))
    return rows


def _longer(one: Timing, other: Timing) -> Timing:
    """Whichever takes longer in most rounds: the one of a round would always be one that was held up."""
    return max(one, other, key=lambda each: each.median)


def _sum(one: Timing, other: Timing) -> Timing:
    return Timing(ms=tuple(a + b for a, b in zip(one.ms, other.ms, strict=True)))


def _best(mode: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest number of chunks, and what binds it."""
    steps = [each for each in rows if each["mode"] == mode and each["peer"] == "step"]
    best = min(steps, key=lambda each: each["ms_median"])
    parts = {each["peer"]: each["ms_median"] for each in rows if each["mode"] == mode and each["chunks"] == 1}
    return {
        "mode": mode,
        "chunks": best["chunks"],
        "longer": max(PARTS[1:], key=lambda part: parts[part]),
        **{name: best[name] for name in ("step_over_longer", "step_over_longer_uncut", "speedup_over_uncut")},
        "uncut_sum_over_longer": sum(parts[part] for part in PARTS[1:]) / max(parts[part] for part in PARTS[1:]),
    }


def _tuner(text: str) -> dict[str, Any]:
    """What it took for these steps, and why."""
    dictionary = Dictionary.from_json(text, "the tuner's dictionary")
    ((key, entry),) = dictionary.entries.items()
    rows = explain(entry, dictionary.rules, dictionary.hardware.busy)
    return {
        "rows_an_expert": [WINDOW * key.capacity, WINDOW * (key.capacity + 1) - 1],
        "busy": dictionary.hardware.busy,
        "choice": next(_words(each.choice) for each in rows if each.reason.startswith("taken")),
        "candidates": [
            {
                "strategy": vars(each.choice),
                "predicted_s": each.predicted_s,
                "measured_s": each.measured_s,
                "steps": each.steps,
                "reason": each.reason,
            }
            for each in rows
        ],
    }


def _words(choice: Choice) -> dict[str, Any]:
    return dict(vars(choice))
