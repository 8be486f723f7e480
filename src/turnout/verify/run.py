"""Run the checks on a subject."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from turnout.errors import ConfigError
from turnout.verify import gradients, losses, outputs, padding, routing, state  # noqa: F401  (they fill the table)
from turnout.verify.check import CHECKS, Check, Measured, Outcome, Result
from turnout.verify.subject import NotApplicable, Sizes, Subject


def verify(
    subject: Subject, ids: Sequence[str] = (), *, on_result: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Every check (or those named) on the subject, in the order of the table.

    A check stops at its first failing case, and cases go from small to large: what is shown is the smallest failure.
    An exception inside a layer is a failure of the check, not of the suite.
    Raises: ConfigError for an unknown id, or if what is to be built is no layer, or has settings that do not fit.
    """
    _require_layer(subject)
    results = []
    for id in ids or in_order(CHECKS.names()):
        result = _run(id, CHECKS[id], subject)
        on_result(result)
        results.append(result)
    return results


def in_order(ids: Sequence[str]) -> list[str]:
    """Ids as a person counts: O2 before O10."""
    return sorted(ids, key=lambda id: (id[0], int(id[1:])))


def _require_layer(subject: Subject) -> None:
    """Without a layer every check would fail, for the one reason that is told here."""
    try:
        subject.layer(Sizes())
    except ConfigError:
        raise
    except NotApplicable:  # of these sizes; others may do
        return
    except Exception as error:  # whatever a factory of others' raises
        raise ConfigError(
            f"{subject.name} gave no layer when asked for {Sizes()}: {type(error).__name__}: {_first_line(error)}; "
            "a factory must build what it is asked for, or leave sizes out of its parameters and build its own"
        ) from error


def _run(id: str, check: Check, subject: Subject) -> Result:
    worst: Measured | None = None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for case in check.cases(subject):
                measured = _allowing(case, subject.rounding)
                if not measured.holds:
                    return _result(id, check, "fail", measured.case, measured)
                if worst is None or measured.error > worst.error:
                    worst = measured
    except NotApplicable as reason:
        return _result(id, check, "not applicable", str(reason))
    except Exception as error:  # whatever a layer of others' raises
        return _result(id, check, "fail", f"{type(error).__name__}: {_first_line(error)}")
    if worst is None:
        return _result(id, check, "not applicable", "no case fits this layer")
    return _result(id, check, "pass", worst.case, worst)


def _allowing(measured: Measured, rounding: float) -> Measured:
    """The case, by the standard of what the subject computes in; what must be exact must be exact all the same."""
    return replace(measured, tolerance=max(measured.tolerance, rounding)) if measured.tolerance else measured


def _result(id: str, check: Check, outcome: Outcome, case: str, measured: Measured | None = None) -> Result:
    return Result(
        id=id,
        title=check.title,
        outcome=outcome,
        error=None if measured is None else measured.error,
        tolerance=None if measured is None else measured.tolerance,
        case=case,
        meaning=check.meaning,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
