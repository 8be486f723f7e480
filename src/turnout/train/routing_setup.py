"""How a recipe's tokens are routed, written out whole: so that a result says what it is of."""

from dataclasses import dataclass
from typing import Any

from turnout.config import to_dict
from turnout.train.later_tokens import SeesLater, sees_later_tokens
from turnout.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class RoutingSetup:
    """Every setting of a recipe's router, capacity and losses, each as in a recipe, with its name."""

    router: dict[str, Any]
    capacity: dict[str, Any]
    losses: tuple[dict[str, Any], ...]  # auxiliary ones; none where the router balances itself, or cannot be balanced
    own_balance: str  # how the router balances without them; empty: it does not
    sees_later_tokens: SeesLater  # when a token's experts, weights or drops depend on tokens after it


def routing_setup(recipe: Recipe) -> RoutingSetup | None:
    """None for a dense recipe."""
    moe = recipe.model.moe
    if moe is None or not recipe.model.moe_layers():
        return None
    return RoutingSetup(
        router=to_dict(moe.router),
        capacity=to_dict(moe.capacity),
        losses=tuple(to_dict(loss) for loss in moe.losses),
        own_balance=moe.router.own_balance,
        sees_later_tokens=sees_later_tokens(recipe.model.dim, moe),
    )
