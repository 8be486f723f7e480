"""Which settings of a run may change when it goes on, and which are part of what it is."""

from collections.abc import Iterator, Mapping
from typing import Any

from turnout.config import from_dict, to_dict
from turnout.errors import ConfigError
from turnout.train.recipe import Recipe

# how fast it learns, how long, how careful and on what machines: not what model sees what text
CHANGEABLE = (
    "name",
    "optimizer",
    "schedule",
    "loop.steps",
    "loop.minutes",
    "loop.eval_every",
    "loop.save_every",
    "loop.keep_last",
    "loop.checkpoint",
    "loop.async_save",
    "loop.precision",
    "loop.device",
    "loop.compile",
    "loop.nonfinite",
    "loop.max_skipped",
    "loop.save_failure",
    "loop.timeout_s",
    "loop.sinks",
    "loop.probe",
    "loop.tune",
    "loop.rebalance_every",
    "loop.rebalance_spare",
    "loop.rebalance_on",
    "strategy",
)


def changed_settings(saved: Mapping[str, Any], recipe: Recipe) -> tuple[str, ...]:
    """`field=new (before: old)` for every setting in which `recipe` differs from the saved one, a recipe as data.

    Raises: ConfigError naming the first field that a run keeps to its end, with both values.
    """
    # through Recipe, so that a setting younger than the checkpoint has its default
    before, now = dict(_leaves(to_dict(from_dict(Recipe, saved)))), dict(_leaves(to_dict(recipe)))
    changed = [path for path in before | now if before.get(path) != now.get(path)]
    for path in changed:
        if not any(path == field or path.startswith(f"{field}.") for field in CHANGEABLE):
            raise ConfigError(
                f"{path}={now.get(path, 'nothing')!r} cannot take the place of {before.get(path, 'nothing')!r}, with "
                f"which the run began; put it back or start a new run. What may change: {', '.join(CHANGEABLE)}"
            )
    return tuple(f"{path}={now.get(path)!r} (before: {before.get(path)!r})" for path in changed)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
