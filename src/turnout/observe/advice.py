"""What is wrong with a run and what to try: sentences from numbers.

Thresholds: a dead expert gets under 0.1 % of its fair share, load entropy under 60 % warns and under 40 % is an error,
the busiest expert over 5 times the mean is an error (after moewatch); under 3 times, leave the balance alone (plumb).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from turnout.observe.remedies import remedies, setting_names
from turnout.observe.run_summary import RunSummary
from turnout.observe.spikes import SpikeRule

Severity = Literal["error", "warn", "note", "good"]

_ORDER: tuple[Severity, ...] = ("error", "warn", "note", "good")
_SPIKE = SpikeRule()
_NAMED = 3  # layers, steps or experts named in one sentence


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing a run shows."""

    severity: Severity
    title: str
    text: str  # what was seen, with its numbers
    try_: str = ""  # what to do about it


def advise(summary: RunSummary) -> list[Finding]:
    """The findings on a run, worst first; when nothing is wrong, one that says so with the numbers."""
    found = [finding for rule in _RULES for finding in rule(summary)]
    if summary.last_step and not any(f.severity in ("error", "warn") for f in found):
        found.append(_all_well(summary))
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def _not_finite(summary: RunSummary) -> Iterable[Finding]:
    if not summary.nonfinite:
        return
    first, last = summary.nonfinite[0], summary.nonfinite[-1]
    yield Finding(
        severity="error",
        title=f"The loss was not a number at {_count(len(summary.nonfinite), 'step')}",
        text=f"First at step {first:,}, last at step {last:,}." if last != first else f"It was step {first:,}.",
        try_=remedies(summary.routing).nonfinite,
    )


def _not_learning(summary: RunSummary) -> Iterable[Finding]:
    first, last = summary.loss_first, summary.loss_last
    if summary.last_step >= 50 and last > 0.99 * first:
        yield Finding(
            severity="error" if last > 1.05 * first else "warn",
            title="The training loss is not falling",
            text=f"It began at {first:.3f} and stands at {last:.3f} after {summary.last_step:,} steps.",
            try_="Check that targets are the inputs shifted by one, then try a learning rate 3 times higher and one 10 "
            "times lower for a few hundred steps each.",
        )


def _spiking(summary: RunSummary) -> Iterable[Finding]:
    if spikes := summary.spikes:
        worst = max(spikes, key=lambda spike: spike.loss - spike.usual)
        yield Finding(
            severity="warn",
            title=f"The loss jumped {_count(len(spikes), 'time')}",
            text=f"The largest jump, at step {worst.step:,}, went from about {worst.usual:.3f} to {worst.loss:.3f} "
            f"(more than {_SPIKE.sigmas:g} sigma over the {_SPIKE.window} steps before).",
            try_=remedies(summary.routing).spikes,
        )


def _overfitting(summary: RunSummary) -> Iterable[Finding]:
    if len(summary.evals) < 3:
        return
    best_step, best = min(summary.evals, key=lambda pair: pair[1])
    last_step, last = summary.evals[-1]
    since = [loss for step, loss in summary.evals if step > best_step]
    if len(since) >= 2 and last > 1.01 * best:
        yield Finding(
            severity="warn",
            title="The validation loss is rising",
            text=f"Best {best:.3f} at step {best_step:,}, now {last:.3f} at step {last_step:,} "
            f"({_percent(last / best - 1)} higher).",
            try_=f"A new run of about {best_step:,} steps ends near its best; loop.keep_last keeps more checkpoints to "
            "go back to. To train for longer: more data, more weight decay, fewer or smaller experts.",
        )


def _no_eval(summary: RunSummary) -> Iterable[Finding]:
    if summary.last_step and not summary.evals:
        yield Finding(
            severity="note",
            title="There is no evaluation",
            text="Without a validation loss, memorising the training text looks like learning.",
            try_="Set aside a validation split and evaluate every few hundred steps.",
        )


def _dead(summary: RunSummary) -> Iterable[Finding]:
    layers = [layer for layer in summary.layers if layer.dead]
    if not layers:
        return
    dead = sum(len(layer.dead) for layer in layers)
    total = sum(len(layer.load) for layer in summary.layers)
    is_many = any(len(layer.dead) > 0.1 * len(layer.load) for layer in layers)
    named = _join(
        [f"{layer.name}: {_experts(layer.dead)}" for layer in sorted(layers, key=lambda layer: -len(layer.dead))]
    )
    yield Finding(
        severity="error" if is_many else "warn",
        title=f"{dead} of {total} experts {'is' if dead == 1 else 'are'} dead",
        text=f"{_capital(_window(summary))} they got less than 0.1 % of a fair share: {named}. "
        "Their parameters cost memory and do nothing.",
        try_=remedies(summary.routing).dead,
    )


def _collapsed(summary: RunSummary) -> Iterable[Finding]:
    layers = sorted((layer for layer in summary.layers if layer.entropy < 0.6), key=lambda layer: layer.entropy)
    if layers:
        worst = layers[0]
        yield Finding(
            severity="error" if worst.entropy < 0.4 else "warn",
            title=f"Routing has collapsed in {_count(len(layers), 'layer')}",
            text=f"{_capital(_window(summary))} the load of {worst.name} has {_percent(worst.entropy)} of the greatest "
            f"entropy: it works as if it had {worst.effective_experts:.1f} experts, not {len(worst.load)}."
            + _also([layer.name for layer in layers[1:]]),
            try_=remedies(summary.routing).collapse,
        )


def _skewed(summary: RunSummary) -> Iterable[Finding]:
    layers = sorted((layer for layer in summary.layers if layer.max_load > 3), key=lambda layer: -layer.max_load)
    if layers:
        worst = layers[0]
        yield Finding(
            severity="error" if worst.max_load > 5 else "warn",
            title=f"One expert carries {worst.max_load:.1f} times its fair share",
            text=f"{_capital(_window(summary))} it is expert {worst.hottest} of {worst.name}. Under expert parallelism "
            f"all ranks wait for it: expert time is up to {worst.max_load:.1f} times that of an even load."
            + _also([layer.name for layer in layers[1:]]),
            try_=remedies(summary.routing).skew,
        )


def _dropping(summary: RunSummary) -> Iterable[Finding]:
    if not summary.layers:
        return
    weight = [layer.fair_count * len(layer.load) for layer in summary.layers]
    share = sum(w * layer.dropped_share for w, layer in zip(weight, summary.layers, strict=True)) / sum(weight)
    worst = max(summary.layers, key=lambda layer: layer.dropped_share)
    if share > 0.02 or worst.dropped_share > 0.1:
        yield Finding(
            severity="error" if share > 0.1 else "warn",
            title=f"{_percent(share)} of assignments are dropped",
            text=f"{_capital(_window(summary))} {worst.name} drops most, {_percent(worst.dropped_share)}, for want of "
            "room at their experts. A token whose choices are all dropped gets nothing from routed experts.",
            try_=remedies(summary.routing).drops,
        )


def _declining(summary: RunSummary) -> Iterable[Finding]:
    if summary.declined_share > 0.02:
        names = setting_names(summary.routing)
        yield Finding(
            severity="note",
            title=f"The router leaves out {_percent(summary.declined_share)} of its choices",
            text="It does so by design, and not for want of room: these are not counted as dropped. A token whose "
            "choices are all left out gets nothing from routed experts.",
            try_=f"If that is more than you want, change a setting of the router: {names}." if names else "",
        )


def _undecided(summary: RunSummary) -> Iterable[Finding]:
    if summary.routing.learns and summary.last_step >= 200 and summary.router_entropy > 0.98:
        yield Finding(
            severity="note",
            title="The router hardly chooses",
            text=f"Its probabilities have {_percent(summary.router_entropy)} of the greatest entropy: nearly the same "
            "for every expert, so experts have little reason to differ.",
            try_=remedies(summary.routing).undecided,
        )


def _slowing(summary: RunSummary) -> Iterable[Finding]:
    early, late = summary.tokens_per_s_early, summary.tokens_per_s_late
    if summary.last_step >= 50 and late < 0.7 * early:
        yield Finding(
            severity="warn",
            title=f"Training slowed down by {_percent(1 - late / early)}",
            text=f"From {early:,.0f} to {late:,.0f} tokens per second between the first and the last quarter.",
            try_="Look for other work on the machine, thermal throttling, or a load that grew uneven.",
        )


def _all_well(summary: RunSummary) -> Finding:
    parts = []
    if summary.loss_last < summary.loss_first:
        parts.append(f"the training loss fell from {summary.loss_first:.3f} to {summary.loss_last:.3f}")
    if len(summary.evals) > 1:
        parts.append(f"the validation loss ends at {summary.evals[-1][1]:.3f}, and is not rising")
    if summary.layers:
        busiest = max(layer.max_load for layer in summary.layers)
        entropy = min(layer.entropy for layer in summary.layers)
        total = sum(len(layer.load) for layer in summary.layers)
        parts.append(f"all {total} experts are in use, the busiest at {busiest:.2f} times its fair share")
        parts.append(f"load entropy is {_percent(entropy)} of the greatest possible")
    text = "; ".join(parts) or "no loss spikes, and no step without a finite loss"
    return Finding(severity="good", title="Nothing looks wrong", text=f"{_capital(text)}.")


def _window(summary: RunSummary) -> str:
    first, last = summary.window
    return f"over steps {first:,} to {last:,}"


def _experts(experts: Sequence[int]) -> str:
    named = ", ".join(map(str, experts[:8]))
    more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
    return f"{'expert' if len(experts) == 1 else 'experts'} {named}{more}"


def _also(names: Sequence[str]) -> str:
    return f" Also {_join(list(names), ', ')}." if names else ""


def _join(parts: list[str], separator: str = "; ") -> str:
    more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    return separator.join(parts[:_NAMED]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _percent(share: float) -> str:
    is_near_an_end = abs(share) < 0.0995 or 0.99 < share < 1
    return f"{100 * share:.{1 if is_near_an_end else 0}f}\N{NO-BREAK SPACE}%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_RULES: tuple[Callable[[RunSummary], Iterable[Finding]], ...] = (
    _not_finite,
    _not_learning,
    _spiking,
    _overfitting,
    _dead,
    _collapsed,
    _skewed,
    _dropping,
    _declining,
    _slowing,
    _undecided,
    _no_eval,
)
