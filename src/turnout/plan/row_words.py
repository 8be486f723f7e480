"""Words of a row in the schema of published_cases.json that name a choice; a word nobody here knows is refused."""

import re
from typing import Literal, TypeVar

from turnout.plan.row_fields import Refused, Row
from turnout.strategy import Precision

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "dualpipe", "gpipe"]
Recompute = Literal["none", "light", "selective", "full"]
Choice = TypeVar("Choice", bound=str)

# what to look for, the first that is found deciding
_PRECISIONS: tuple[tuple[str, Precision], ...] = (
    ("fp4", "fp4"), ("fp8|float8", "fp8"), ("bf16|bfloat16", "bf16"), ("fp16|float16", "fp16"),
    ("fp32|float32", "fp32"),
)  # fmt: skip
_SCHEDULES: tuple[tuple[str, Schedule], ...] = (
    ("interleave", "interleaved"), ("zero.?bubble", "zero_bubble"), ("dualpipe", "dualpipe"), ("gpipe", "gpipe"),
    ("1f1b", "1f1b"),
)  # fmt: skip
# all of a block; scores, or torchtitan's every second product; Megatron-Core's --recompute-modules; with "sequence
# parallel" alone nothing is computed again
_RECOMPUTES: tuple[tuple[str, Recompute], ...] = (
    ("full|rematerial", "full"), ("selective|core_attn", "selective"), ("light|layernorm|mla_up_proj|moe_act", "light"),
    (r"\bnone\b|\bno\b|\boff\b|\bfalse\b|sequence", "none"),
)  # fmt: skip
_DISPATCHERS: tuple[tuple[str, Literal["deepep", "alltoall"]], ...] = (
    ("deepep|hybridep", "deepep"), ("a2a|all.?to.?all", "alltoall"),
)  # fmt: skip


def precision_of(row: Row) -> Precision:
    """Precision of matrix products. Raises: Refused if the row names one we do not know."""
    named: Precision | None = _named(row, "precision", _PRECISIONS)
    return named or "bf16"


def schedule_of(row: Row) -> Schedule | None:
    """The schedule of the pipeline; None if the row names none. Raises: Refused if it names one we do not know."""
    return _named(row, "schedule", _SCHEDULES)


def dispatcher_of(row: Row) -> Literal["deepep", "alltoall"] | None:
    """What rows are sent by; None if the row names nothing. Raises: Refused if it names what we do not know."""
    return _named(row, "dispatcher", _DISPATCHERS)


def recompute_of(row: Row) -> Recompute | None:
    """What is computed again by the row's field, or without one by its notes; None if neither says.

    Raises: Refused if the field says what we do not know.
    """
    if row.get("recompute") is not None:
        named: Recompute | None = _named(row, "recompute", _RECOMPUTES)
        return named or "none"
    notes = str(row.get("notes") or "").lower()
    if "recompute" not in notes:
        return None
    noted: Recompute | None = _found(notes, _RECOMPUTES)
    return noted or "none"


def _named(row: Row, field: str, known: tuple[tuple[str, Choice], ...]) -> Choice | None:
    said = row.get(field)
    if not said:
        return None
    found = _found(str(said).lower(), known)
    if found is None:
        raise Refused(f"{field}={said!r} is not known; known: {', '.join(choice for _, choice in known)}")
    return found


def _found(said: str, known: tuple[tuple[str, Choice], ...]) -> Choice | None:
    return next((choice for words, choice in known if re.search(words, said)), None)
