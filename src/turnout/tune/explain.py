"""Why a choice was made: candidates with what was predicted and what was measured."""

from dataclasses import dataclass

from turnout.tune.choice import Choice
from turnout.tune.search import Entry, Rules, choose, tried


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate of a key."""

    choice: Choice
    predicted_s: float
    measured_s: float | None  # median; None: never tried
    steps: int  # that it was measured in
    reason: str


def explain(entry: Entry, rules: Rules, busy: float = 0.0) -> list[Row]:
    """All candidates, fastest first, those that were not tried last.

    `busy`: the share of an exchange in which the processor itself is at work.
    """
    if not entry.predicted:
        return []
    times, candidates = entry.times(entry.predicted), tried(entry.predicted, rules)
    chosen = choose(entry, entry.predicted, rules)
    rows = []
    for choice, predicted_s in entry.predicted.items():
        trial = entry.trials.get(choice)
        rows.append(
            Row(
                choice=choice,
                predicted_s=predicted_s,
                measured_s=times.get(choice),
                steps=0 if trial is None else trial.steps,
                reason=_reason(choice, chosen, times, entry, candidates, busy),
            )
        )
    return sorted(rows, key=lambda row: (row.measured_s is None, row.measured_s or row.predicted_s, row.choice))


def _reason(
    choice: Choice, chosen: Choice, times: dict[Choice, float], entry: Entry, candidates: list[Choice], busy: float
) -> str:
    if choice == chosen:
        return "taken: " + (_why_chosen(choice, times, busy) if choice in times else "to be measured next")
    if choice in times:
        slower = times[choice] / min(times.values())
        return f"measured at {slower:.2f} times the fastest" + (
            ", tried once" if entry.trials[choice].steps == 1 else ""
        )
    if choice in candidates:
        return "not measured yet"
    ratio = entry.predicted[choice] / min(entry.predicted.values())
    return f"not tried: predicted at {ratio:.2f} times the best, behind {len(candidates)} others"


def _why_chosen(choice: Choice, times: dict[Choice, float], busy: float) -> str:
    if times[choice] > min(times.values()):
        return "to be measured again"
    cut = [
        seconds
        for other, seconds in times.items()
        if (other.adaptive_r, other.alltoall) == (choice.adaptive_r, choice.alltoall) and other.overlap > 1
    ]
    if choice.overlap > 1 or not cut:
        return "the fastest measured"
    loss = min(cut) / times[choice] - 1
    why = f"the processor is at work in {busy:.0%} of an exchange" if busy > 0.5 else "chunks cost more than they hide"
    return f"the fastest measured; in chunks {loss:.0%} slower: {why}"
