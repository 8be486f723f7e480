"""A run in a few numbers, as `turnout train --json` ends with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnout.models.size import sizes
from turnout.train.progress import Counters
from turnout.train.recipe import Recipe


def summary_of(run: Path, recipe: Recipe, counters: Counters, line: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers so far; `line`: the record of the last step."""
    size = sizes(recipe.model)
    return {
        "run": str(run),
        "recipe": recipe.name,
        "seed": recipe.seed,
        "steps": counters.step,
        "seconds": round(counters.seconds, 2),
        "tokens": counters.tokens,
        "tokens_per_s": round(counters.tokens / max(counters.seconds, 1e-9), 1),
        "train_loss": counters.train_loss,
        "val_loss": counters.val_loss,
        "params_total": size.total,
        "params_active": size.active,
        "dropped_share": line.get("dropped_share", 0.0),
        "max_violation": line.get("max_violation", 0.0),
    }
