"""`trace/tokens-step-N.json`: a text, and which experts each of its tokens went to in every layer.

    {"step": N, "tokens": [piece], "layers": [name], "experts": [layer][token][choice], "weights": the same}

Tokens may differ in their number of choices; a token that no expert took has none.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turnout.errors import ShapeError
from turnout.tensors import Assignment

_NAME = re.compile(r"tokens-step-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One routed text. Choices stand in the router's order of preference."""

    step: int
    tokens: Sequence[str]  # text pieces; joined they give the text
    layers: Sequence[str]
    experts: Sequence[Sequence[Sequence[int]]]  # [layer][token][choice]
    weights: Sequence[Sequence[Sequence[float]]]  # [layer][token][choice]

    def __post_init__(self) -> None:
        for name, rows in (("experts", self.experts), ("weights", self.weights)):
            if len(rows) != len(self.layers) or any(len(row) != len(self.tokens) for row in rows):
                raise ShapeError(
                    f"{name} must list {len(self.tokens)} tokens for each of {len(self.layers)} layers; "
                    f"got {[len(row) for row in rows]}"
                )


def token_choices(assignment: Assignment) -> tuple[list[list[int]], list[list[float]]]:
    """The experts and weights of every token of one layer: what a `TokenView` wants for it."""
    experts: list[list[int]] = [[] for _ in range(assignment.num_tokens)]
    weights: list[list[float]] = [[] for _ in range(assignment.num_tokens)]
    order_N = assignment.choice_N.argsort(stable=True)
    columns = (assignment.token_N, assignment.expert_N, assignment.weight_N)
    for token, expert, weight in zip(*(column[order_N].tolist() for column in columns), strict=True):
        experts[token].append(expert)
        weights[token].append(weight)
    return experts, weights


def write_token_view(run: Path, view: TokenView) -> Path:
    """Write the view into the run's trace folder; an earlier one of the same step is replaced."""
    path = run / "trace" / f"tokens-step-{view.step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = [[[round(w, 4) if math.isfinite(w) else None for w in token] for token in row] for row in view.weights]
    part = path.with_suffix(".part")
    # vars, for asdict would copy every number
    part.write_text(json.dumps(vars(view) | {"weights": weights}, separators=(",", ":")), encoding="utf-8")
    part.replace(path)
    return path


def read_token_views(run: Path) -> tuple[TokenView, ...]:
    """All token views of a run in order of step; a file that is not one is left out."""
    views = []
    for path in sorted((run / "trace").glob("tokens-step-*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            experts = [[[int(e) for e in token] for token in row] for row in fields["experts"]]
            fields = {name: fields[name] for name in TokenView.__dataclass_fields__}
            views.append(TokenView(**fields | {"step": int(fields["step"]), "experts": experts}))
        except (OSError, ValueError, KeyError, TypeError, ShapeError):
            continue
    return tuple(sorted(views, key=lambda view: view.step))


def cut_token_views(run: Path, step: int) -> None:
    """Delete the views after `step`."""
    for path in (run / "trace").glob("tokens-step-*.json"):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > step:
            path.unlink()
