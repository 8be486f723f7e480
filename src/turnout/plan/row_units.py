"""Units of rows in the schema of published_cases.json: what one of the planner's own is in a row's, however spelled."""

import re
from dataclasses import dataclass

from turnout.plan.row_fields import Refused, Row

# how many of the row's unit are one of ours
SECONDS = {"s": 1.0, "ms": 1e3, "us": 1e6, "min": 1 / 60, "h": 1 / 3600, "day": 1 / 86400}
TOKENS_PER_S = {"tok/s": 1.0, "ktok/s": 1e-3, "mtok/s": 1e-6}
SEQUENCES_PER_S = {"seq/s": 1.0}
FLOPS_PER_S = {"gflop/s": 1e-9, "tflop/s": 1e-12, "pflop/s": 1e-15}
# of these the case matters: Gb is no GB
BYTES = {"GiB": 2.0**-30, "GB": 1e-9, "MiB": 2.0**-20, "MB": 1e-6, "B": 1.0, "bytes": 1.0}
BYTES_PER_S = {"GB/s": 1e-9, "GiB/s": 2.0**-30, "MB/s": 1e-6, "Gb/s": 8e-9}

_SPELLINGS = (
    (r"\s+|\^?-1$", ""), ("µ|μ", "u"), (r"(?<=\w)per(?=[sgdcn])", "/"), ("seconds?|secs?", "s"), ("minutes?", "min"),
    ("hours?", "h"), ("days", "day"), ("tokens?", "tok"), ("samples?|sequences?", "seq"), ("flops?", "flop"),
    ("gpus?|devices?|chips?|npus?|accelerators?", "gpu"), (r"flop(?!/s)", "flop/s"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What to multiply by for a row's unit."""

    per_ours: float
    per_device: bool  # the unit says "of one device"


def unit_of(row: Row, known: dict[str, float], default: str) -> Unit:
    """The row's unit, `default` where it gives none.

    Raises: Refused if it is none of `known`.
    """
    said = str(row.get("unit") or default)
    words = said
    if known not in (BYTES, BYTES_PER_S):
        words = said.lower()
        for pattern, short in _SPELLINGS:
            words = re.sub(pattern, short, words)
    alone = re.sub(r"/(gpu|GPU)$", "", words)
    if alone not in known:
        raise Refused(f"unit {said!r} is none of {row.get('quantity')!r}; known: {', '.join(known)}")
    return Unit(per_ours=known[alone], per_device=alone != words)


def share_of(row: Row) -> tuple[float, float | None]:
    """(how many of the row's unit are the whole, the peak it is of in TFLOP/s if it says one): "%", "% of 989.5", "".

    Raises: Refused for a unit that is no share.
    """
    said = str(row.get("unit") or "").lower().strip()
    form = re.fullmatch(r"(%|percent|fraction|share|ratio|1)?\s*(?:of ([\d.]+)\s*(?:tflop\S*)?|of .*peak)?", said)
    if form is None:
        raise Refused(f"unit {row.get('unit')!r} is no share of a peak; known: '%', '% of 989.5', 'fraction'")
    return (100.0 if form[1] in ("%", "percent") else 1.0), float(form[2]) if form[2] else None
