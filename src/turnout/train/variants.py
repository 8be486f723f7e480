"""One recipe with each of several routers, everything else equal."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from turnout.contracts import RouterConfig
from turnout.errors import ConfigError
from turnout.losses import LoadBalance
from turnout.train.recipe import Recipe

# what a router shares with the recipe's own, where it has such a setting
SHARED = ("k", "scale", "init_std")


def with_routers(recipe: Recipe, names: Sequence[str]) -> list[Recipe]:
    """RECIPE-ROUTER for each name: `k`, `scale` and `init_std` of the recipe's router where the other has them and may.

    A router that does not balance itself, and that a loss can move, gets the load-balance loss at its default; one that
    looks ahead is let into the decoder, where its validation loss is too good: it sees the tokens it predicts.
    Raises: ConfigError if the recipe has no experts or a router is unknown.
    """
    moe = recipe.model.moe
    if moe is None:
        raise ConfigError(f"{recipe.name} has no experts to route to; --routers needs a recipe that has")
    return [_variant(recipe, name, _like(moe.router, RouterConfig.TABLE[name], moe.num_experts)) for name in names]


def _variant(recipe: Recipe, name: str, router: RouterConfig) -> Recipe:
    assert recipe.model.moe is not None
    losses = () if router.own_balance or not router.scores_have_gradient else (LoadBalance(),)
    moe = replace(recipe.model.moe, router=router, losses=losses)
    return replace(recipe, name=f"{recipe.name}-{name}", model=replace(recipe.model, moe=moe))


def _like(own: RouterConfig, row: type[RouterConfig], num_experts: int) -> RouterConfig:
    if type(own) is row:
        return own
    known = {field.name for field in fields(row)}  # type: ignore[arg-type]
    asked: dict[str, Any] = {"in_decoder": "allow"} if "in_decoder" in known else {}
    settings = asked | {name: getattr(own, name) for name in SHARED if name in known and hasattr(own, name)}
    for tried in (settings, {n: v for n, v in settings.items() if n != "k"}):
        try:
            router = row(**tried)
            router.build(num_experts, num_experts)
        except ConfigError:
            continue
        return router
    return row(**asked)
