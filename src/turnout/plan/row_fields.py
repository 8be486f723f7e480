"""Rows in the schema of published_cases.json, and their numbers."""

from typing import Any

from turnout.errors import TurnoutError

Row = dict[str, Any]


class Refused(TurnoutError):
    """A row says too little, or asks for what the planner does not model."""


def count(record: Row, name: str, default: int | None = None) -> int:
    """A positive whole number of a row or of a part of one; 0 and null are `default`.

    Raises: Refused if it is missing and has no default, or is not such a number.
    """
    value = record.get(name)
    if value in (None, 0, ""):
        if default is None:
            raise Refused(f"the row does not say {name}")
        return default
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise Refused(f"{name}={value!r} is not a positive whole number")
    return int(value)


def number(record: Row, name: str, default: float) -> float:
    """A number of at least 0; null is `default`. Raises: Refused if it is not one."""
    value = record.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise Refused(f"{name}={value!r} is not a number of at least 0")
    return float(value)
