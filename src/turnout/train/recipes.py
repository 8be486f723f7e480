"""The built-in recipes: one function and one row each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turnout.config import from_dict, load_toml, override, to_dict
from turnout.errors import ConfigError
from turnout.models import presets
from turnout.registry import Table, nearest
from turnout.train.recipe import LoopConfig, OptimizerConfig, Recipe

AUTO = "auto"  # for a strategy: what suits the ranks there are
RECIPES: Table[Callable[[], Recipe]] = Table("recipe")


@RECIPES.register("tiny")
def tiny() -> Recipe:
    """A Mixture-of-Experts language model for two CPU cores and about ten minutes."""
    optimizer = OptimizerConfig(lr=6e-3, expert_lr_scale=0.4)
    return Recipe(name="tiny", model=presets.tiny(), optimizer=optimizer, loop=LoopConfig(batch_size=16))


@RECIPES.register("tiny-dense")
def tiny_dense() -> Recipe:
    """The dense twin of `tiny`: the same data, active FLOPs and wall clock."""
    optimizer = OptimizerConfig(lr=6e-3)
    return Recipe(name="tiny-dense", model=presets.tiny_dense(), optimizer=optimizer, loop=LoopConfig(batch_size=16))


@RECIPES.register("smoke")
def smoke() -> Recipe:
    """A few seconds of training: does everything work here?"""
    loop = LoopConfig(steps=20, batch_size=4, seq_len=64, eval_every=10, eval_tokens=2048, save_every=10)
    return Recipe(name="smoke", model=presets.smoke(), loop=loop)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The built-in recipe or TOML file of that name, with dotted overrides applied.

    Where either says strategy = "auto", the layout is chosen when the ranks are known, and what may change from step to
    step by the tuner.
    Raises: ConfigError naming the built-in recipes, or the field that does not fit.
    """
    return from_dict(Recipe, _chosen_later(override(_recipe_data(name_or_path), overrides)))


def _chosen_later(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe as data without the strategy "auto", which means: none, and a tuner."""
    strategy = data.get("strategy", {})
    if isinstance(strategy, str) and strategy != AUTO:
        raise ConfigError(f'strategy={strategy!r} must be a table, or "{AUTO}"')
    if strategy != AUTO:
        return data
    loop = data.get("loop", {})
    return data | {"strategy": {}, "loop": loop | {"tune": loop.get("tune") or AUTO}}


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises: ConfigError if the folder holds no run.
    """
    if not (run / "recipe.toml").is_file():
        raise ConfigError(f"{run} is not a run folder: it has no recipe.toml")
    return from_dict(Recipe, load_toml(run / "recipe.toml"))


def _recipe_data(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if name_or_path in RECIPES:
        return to_dict(RECIPES[name_or_path]())
    if path.suffix == ".toml" or path.is_file():
        return to_dict(from_dict(Recipe, _chosen_later(load_toml(path))))
    names = RECIPES.names()
    raise ConfigError(
        f"unknown recipe {name_or_path!r}; built in: {', '.join(names)}{nearest(name_or_path, names)}; "
        "or give a TOML file"
    )
