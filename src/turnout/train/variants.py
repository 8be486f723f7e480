"""One recipe with each of several routers, everything else equal."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from turnout.contracts import CapacityPolicy, Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.layers.moe import MoEConfig
from turnout.routers import LocMoE, LocMoEPlus, TopP
from turnout.train.compared_losses import paper_losses
from turnout.train.recipe import Recipe

# what a router shares with the recipe's own beside k, where it has such a setting
SHARED = ("scale", "init_std")
NO_LOCALITY = "without the locality loss of its paper: in one process every expert is on the one node"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The recipe with another router."""

    recipe: Recipe
    notes: tuple[str, ...]  # what could not be as the recipe, the user or the router's paper has it, a line each


def with_routers(recipe: Recipe, names: Sequence[str], losses: Sequence[Loss] | None = None) -> list[Variant]:
    """RECIPE-ROUTER for each name: `k`, `scale` and `init_std` of the recipe's router where the other has them and may.

    Where it may not have that k it gets the nearest it may. What looks ahead is let into the decoder.
    losses: what all of them are trained with, but for those a router cannot have; None: each its paper's.
    Raises: ConfigError if the recipe has no experts or a router is unknown.
    """
    moe = recipe.model.moe
    if moe is None:
        raise ConfigError(f"{recipe.name} has no experts to route to; --routers needs a recipe that has")
    return [_variant(recipe, moe, name, losses) for name in names]


def why_not(recipe: Recipe) -> str:
    """Why the recipe's router cannot be built in its sizes; empty if it can."""
    moe = recipe.model.moe
    assert moe is not None
    try:
        moe.router.build(recipe.model.dim, moe.num_experts)
    except ConfigError as error:
        return str(error)
    return ""


def _variant(recipe: Recipe, moe: MoEConfig, name: str, losses: Sequence[Loss] | None) -> Variant:
    router, notes = _like(moe.router, RouterConfig.TABLE[name], moe.num_experts)
    if losses is None:
        kept = paper_losses(router)
        notes += [NO_LOCALITY] if isinstance(router, LocMoE | LocMoEPlus) else []
    else:
        kept = tuple(loss for loss in losses if not _why_not(loss, router, moe.num_experts))
        notes += [f"without a loss: {why}" for loss in losses if (why := _why_not(loss, router, moe.num_experts))]
    moe = replace(moe, router=router, losses=kept, capacity=_let_in(moe.capacity, router, moe.num_experts))
    own = replace(recipe, name=f"{recipe.name}-{name}", model=replace(recipe.model, moe=moe))
    return Variant(recipe=own, notes=tuple(notes))


def _let_in(capacity: CapacityPolicy, router: RouterConfig, num_experts: int) -> CapacityPolicy:
    """The capacity, which with this router may be one that looks ahead: then as such a router is."""
    try:
        capacity.check_decoder(router, num_experts)
    except ConfigError:
        return replace(capacity, in_decoder="allow")  # type: ignore[call-arg]
    return capacity


def _why_not(loss: Loss, router: RouterConfig, num_experts: int) -> str:
    try:
        loss.check(router, num_experts)
    except ConfigError as error:
        return str(error)
    return ""


def _like(own: RouterConfig, row: type[RouterConfig], num_experts: int) -> tuple[RouterConfig, list[str]]:
    """A router of that row, as near to `own` as it may be, and where it is not."""
    if type(own) is row:
        return own, []
    known = {field.name for field in fields(row)}  # type: ignore[arg-type]
    asked: dict[str, Any] = {"in_decoder": "allow"} if "in_decoder" in known else {}
    shared = {name: getattr(own, name) for name in SHARED if name in known and hasattr(own, name)}
    if "k" not in known:
        router = _first_legal(row, [asked | shared], num_experts) or row(**asked)
        return router, _own_number(router, own.choices) + _changed(router, shared)
    tried = [asked | settings | {"k": k} for settings in (shared, {}) for k in _nearest(own.choices, num_experts)]
    # where no k is legal the fault lies elsewhere, and whoever builds the model says so
    router = _first_legal(row, tried, num_experts) or row(**asked)
    notes = [] if router.choices == own.choices else [_other_k(router, row, tried[0], num_experts)]
    return router, notes + _changed(router, shared)


def _own_number(router: RouterConfig, wanted: int) -> list[str]:
    if isinstance(router, TopP):
        return ["no setting k: how many experts a token gets follows from its probabilities"]
    if router.choices == wanted:
        return []
    return [f"no setting k; experts a token by its own settings: {router.choices}, in the recipe: {wanted}"]


def _nearest(k: int, num_experts: int) -> list[int]:
    return sorted(range(1, num_experts + 1), key=lambda other: (abs(other - k), other))


def _first_legal(row: type[RouterConfig], tried: Sequence[dict[str, Any]], num_experts: int) -> RouterConfig | None:
    return next(
        (router for settings in tried if not isinstance(router := _built(row, settings, num_experts), str)), None
    )


def _built(row: type[RouterConfig], settings: dict[str, Any], num_experts: int) -> RouterConfig | str:
    """The router, or why it cannot be."""
    try:
        router = row(**settings)
        router.build(num_experts, num_experts)
    except ConfigError as error:
        return str(error)
    return router


def _other_k(router: RouterConfig, row: type[RouterConfig], wanted: dict[str, Any], num_experts: int) -> str:
    why = _built(row, wanted, num_experts)
    return f"k={router.choices} in place of the recipe's {wanted['k']} ({why if isinstance(why, str) else 'not legal'})"


def _changed(router: RouterConfig, shared: dict[str, Any]) -> list[str]:
    return [
        f"{name}={getattr(router, name)} in place of the recipe's {value}, which is not legal here"
        for name, value in shared.items()
        if getattr(router, name) != value
    ]
