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
from typing import Any

from turnout.errors import ConfigError, ShapeError
from turnout.observe.metrics import is_step
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


def read_token_view(path: Path) -> TokenView:
    """The view in that file.

    Raises: ConfigError if it is not one.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return _decode(**{name: fields[name] for name in TokenView.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ShapeError) as error:
        raise ConfigError(f"{path} is not a token view: {error}") from error


def token_view_paths(run: Path) -> list[Path]:
    """Where the token views of a run are, in order of step."""
    return [path for _, path in _numbered(run)]


def _decode(*, step: Any, tokens: Any, layers: Any, experts: Any, weights: Any) -> TokenView:
    """Raises: ValueError, TypeError or ShapeError where the fields are not those of a view."""
    view = TokenView(step=step, tokens=tokens, layers=layers, experts=experts, weights=weights)
    if not is_step(step) or not all(type(text) is str for text in [*tokens, *layers]):
        raise ValueError("step must be a whole number, and tokens and layers texts")
    choices = [choice for row in experts for token in row for choice in token]
    if not all(is_step(expert) for expert in choices):
        raise ValueError("experts must be whole numbers")
    if not all(w is None or type(w) in (int, float) for row in weights for token in row for w in token):
        raise ValueError("weights must be numbers")
    if [[len(token) for token in row] for row in weights] != [[len(token) for token in row] for row in experts]:
        raise ValueError("every choice must have one weight")
    return view


def cut_token_views(run: Path, step: int) -> None:
    """Delete the views after `step`."""
    for number, path in _numbered(run):
        if number > step:
            path.unlink()


def _numbered(run: Path) -> list[tuple[int, Path]]:
    """(step, path) of every view of the run, in order."""
    found = [(_NAME.fullmatch(path.name), path) for path in (run / "trace").glob("tokens-step-*.json")]
    return sorted((int(match[1]), path) for match, path in found if match)
