"""Terms of memory and time: each reads a few fields of a layout, so that many layouts share its value.

A formula asks for its terms through `of`, as in `of(head_s)`, and never sees whether it is about one layout (`One`
answers with floats) or about many (`plan.columns.View` answers with arrays of one float a layout). So each formula is
written once.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Numbers = Any  # a float, or an array of one float a layout
S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])


class Terms(Protocol[S]):
    """What answers a formula."""

    subject: S  # the layout; of many, one of them: what they differ in may not be read from it

    def __call__(self, term: Callable[..., Any], *args: Any) -> Any:
        """The value of `term(subject, *args)`: a float or a frozen dataclass of floats, or of arrays."""
        ...


def reads(*fields: str) -> Callable[[F], F]:
    """Says which fields of a layout a term depends on; two layouts alike in these have the same value.

    Beside the fields of Strategy there are "tokens", of a micro-batch on one rank, and "micro_batches" of a step.
    """

    def mark(term: F) -> F:
        term.reads = fields  # type: ignore[attr-defined]
        return term

    return mark


class One(Terms[S]):
    """Answers about one layout, computing each term once."""

    def __init__(self, subject: S) -> None:
        self.subject = subject
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, term: Callable[..., Any], *args: Any) -> Any:
        key = (term, *args)
        if key not in self._known:
            self._known[key] = term(self.subject, *args)
        return self._known[key]


def larger(a: Numbers, b: Numbers) -> Numbers:
    """The larger of two numbers, layout by layout."""
    if _is_number(a) and _is_number(b):
        return max(a, b)
    import numpy as np

    return np.maximum(a, b)


def smaller(a: Numbers, b: Numbers) -> Numbers:
    """The smaller of two numbers, layout by layout."""
    if _is_number(a) and _is_number(b):
        return min(a, b)
    import numpy as np

    return np.minimum(a, b)


def either(condition: Any, yes: Numbers, no: Numbers) -> Numbers:
    """`yes` where the condition holds, else `no`; frozen dataclasses field by field."""
    if isinstance(condition, bool):
        return yes if condition else no
    if not _is_number(yes) and hasattr(yes, "__dataclass_fields__"):
        return type(yes)(**{name: either(condition, value, getattr(no, name)) for name, value in vars(yes).items()})
    import numpy as np

    return np.where(condition, yes, no)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
