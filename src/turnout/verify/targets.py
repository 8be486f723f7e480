"""What `turnout verify TARGET` can name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from turnout import presets
from turnout.errors import ConfigError
from turnout.layers import MoE
from turnout.registry import nearest
from turnout.train.recipes import RECIPES, load_recipe
from turnout.verify.adapters import (
    BLOCKS,
    DEEPSPEED_LAYERS,
    ST_MOE_LAYERS,
    TORCHTITAN_LAYERS,
    from_config,
    from_deepspeed,
    from_factory,
    from_preset,
    from_st_moe_pytorch,
    from_torchtitan,
    from_transformers,
)
from turnout.verify.subject import Subject

# library -> how to build a layer of it by name, and the names
PEERS: Mapping[str, tuple[Callable[[str], Subject], tuple[str, ...]]] = {
    "deepspeed": (from_deepspeed, DEEPSPEED_LAYERS),
    "torchtitan": (from_torchtitan, TORCHTITAN_LAYERS),
    "st_moe_pytorch": (from_st_moe_pytorch, ST_MOE_LAYERS),
}


def peer_targets() -> list[str]:
    """Layers of other libraries besides transformers, installed or not."""
    return [f"{library}:{name}" for library, (_, names) in PEERS.items() for name in names]


def layer_presets() -> list[str]:
    """Names of `turnout.presets` that build a layer."""
    return [
        name for name, part in inspect.getmembers(presets, inspect.isfunction) if part.__annotations__["return"] is MoE
    ]


def subject(target: str, settings: Sequence[str] = ()) -> Subject:
    """The layer a target names: a preset of a paper, a recipe (name, TOML file or run folder), another library's block
    (`transformers:mixtral`, `transformers:mixtral:grouped_mm`, `deepspeed:top2`), or a factory
    (`package.module:function`). `settings` are dotted overrides of a recipe, `a.b=value`.

    Raises: ConfigError naming what there is, or the setting that does not fit.
    """
    if settings and not _is_recipe(target):
        names = RECIPES.names()
        raise ConfigError(
            f"--set {settings[0]} changes a recipe, which {target!r} is not; recipes: {', '.join(names)}"
            f"{nearest(target, names)}, a recipe.toml, a run folder"
        )
    library, _, rest = target.partition(":")
    if library == "transformers" and rest:
        return from_transformers(*rest.split(":", 1))
    if library in PEERS:
        return PEERS[library][0](rest)
    if rest:
        return from_factory(target)
    if target in layer_presets():
        return from_preset(target)
    if _is_recipe(target):
        return _recipe(target, settings)
    known = [*layer_presets(), *RECIPES.names(), *(f"transformers:{name}" for name in BLOCKS), *peer_targets()]
    raise ConfigError(
        f"unknown target {target!r}; available: {', '.join(known)}{nearest(target, known)}; "
        "or a recipe.toml, a run folder, package.module:factory"
    )


def _is_recipe(target: str) -> bool:
    return target in RECIPES or target.endswith(".toml") or _file_of_run(target).is_file()


def _file_of_run(target: str) -> Path:
    return Path(target) / "recipe.toml"


def _recipe(target: str, settings: Sequence[str]) -> Subject:
    file = _file_of_run(target)
    recipe = load_recipe(str(file) if file.is_file() else target, settings)
    name = " ".join([target, *settings])
    if recipe.model.moe is None:
        raise ConfigError(f"{name} has no Mixture-of-Experts layer to verify")
    return from_config(f"{name}: its MoE layer", recipe.model.dim, recipe.model.moe)
