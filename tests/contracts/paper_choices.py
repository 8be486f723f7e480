"""What the formulas of routers give, and when a layer's own choice is as good as theirs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Choices = list[list[int]]  # of each token, its experts, best first


@dataclass(frozen=True, kw_only=True)
class Own:
    """What the layer chose: taken where a formula scores it the same but for rounding."""

    choices: Choices
    declined: frozenset[tuple[int, int]]  # (token, expert)
    tolerance: float  # infinite: always taken, for a dtype in which near-ties fall either way


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a formula gives for R tokens; gates hold for the experts that are chosen."""

    logits_RE: Tensor
    scores_RE: Tensor
    choices: Choices
    gate_RE: Tensor
    even: bool = True  # every token has as many
    declined: frozenset[tuple[int, int]] = frozenset()  # (token, expert): chosen, and not to be sent
    priority_RE: Tensor | None = None  # what a capacity by score keeps first; None: the gates
    least_capacity: int = 0  # rows of room that every expert is to have
    loss: Tensor | None = None  # the router's own
    smooth_load_E: Tensor | None = None


def settled(mine: Sequence[Sequence[int]], own: Own, score: Tensor) -> Choices:
    """The choices of each row; the layer's own in rows where they score the same one by one, within the tolerance."""
    found, rows = [list(row) for row in mine], score.tolist()
    if own.tolerance == math.inf:
        return own.choices
    for i, (first, second) in enumerate(zip(found, own.choices, strict=True)):
        pairs = zip(first, second, strict=False)
        if len(first) == len(second) and all(abs(rows[i][a] - rows[i][b]) <= own.tolerance for a, b in pairs):
            found[i] = list(second)
    return found


def by_score(chosen: Choices, score: Tensor) -> Choices:
    """Each row's in falling order of the score, of equals the lower index first."""
    rows = score.tolist()
    return [sorted(own, key=lambda i: (-row[i], i)) for row, own in zip(rows, chosen, strict=True)]
