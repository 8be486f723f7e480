"""The table of checks, and what one of them finds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from turnout.registry import Table
from turnout.verify.subject import Subject

Outcome = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One case of a check: how far off it was, and how far it may be."""

    error: float
    tolerance: float
    case: str  # sizes and seed, to build it again

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Check:
    """A law of layers, with cases from small to large."""

    title: str
    meaning: str  # what a failure costs its user
    cases: Callable[[Subject], Iterable[Measured]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one check found: of the first case that fails, or of the worst that holds."""

    id: str
    title: str
    outcome: Outcome
    error: float | None
    tolerance: float | None
    case: str  # the smallest failing case, the worst passing one, or why the check does not apply
    meaning: str


CHECKS: Table[Check] = Table("check")


def check(id: str, title: str, *, meaning: str) -> Callable[[Callable[[Subject], Iterable[Measured]]], Callable]:
    """Enter a generator of cases in the table."""

    def enter(cases: Callable[[Subject], Iterable[Measured]]) -> Callable[[Subject], Iterable[Measured]]:
        CHECKS.register(id)(Check(title=title, meaning=meaning, cases=cases))
        return cases

    return enter
