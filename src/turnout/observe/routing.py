"""What a run's recipe says of its router: whether it learns, how it chooses, and what of it can be changed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import turnout.losses
import turnout.routers  # noqa: F401  (both fill their tables)
from turnout.config import describe, from_dict
from turnout.contracts import Loss, RouterConfig
from turnout.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The router of a run, in words. As it stands: a router nothing is known of, which is taken to learn."""

    learns: bool = True
    rule: str = ""  # how it chooses, one sentence
    settings: tuple[tuple[str, str], ...] = ()  # (name, meaning) of each
    own_balance: str = ""  # how it balances load by itself, in a few words
    balance_losses: tuple[str, ...] = ("load_balance",)  # names of the losses that balance it


_BALANCING = [name for name, loss in Loss.TABLE.items() if loss.balances]


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    router: RouterConfig


def routing_of(recipe: Mapping[str, Any]) -> Routing:
    """The routing of a parsed `recipe.toml`; of a recipe without experts, the one nothing is known of.

    Raises: ConfigError if this release has no such router or setting.
    """
    moe = recipe
    for key in ("model", "moe"):
        if not isinstance(moe, Mapping) or key not in moe:
            return Routing()
        moe = moe[key]
    if not isinstance(moe, Mapping) or "router" not in moe:
        return Routing()
    try:
        chosen = from_dict(_Chosen, {"router": moe["router"]}).router
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"model.moe.router: {error}") from error
    return Routing(
        learns=chosen.scores_have_gradient,
        rule=_rule(type(chosen)),
        settings=_settings(type(chosen)),
        own_balance=chosen.own_balance,
        balance_losses=_balance_losses(moe.get("losses")),
    )


def _balance_losses(losses: Any) -> tuple[str, ...]:
    """Names of those that balance, at a coefficient above 0; of a recipe that says nothing of losses, its default."""
    if not isinstance(losses, list):
        return Routing().balance_losses
    named = [loss for loss in losses if isinstance(loss, Mapping) and loss.get("coefficient", 1)]
    return tuple(str(loss["name"]) for loss in named if loss.get("name") in _BALANCING)


def _rule(row: type[RouterConfig]) -> str:
    """The first sentence of the row's docstring; a dataclass without one has its signature there."""
    first = (row.__doc__ or "").strip().partition("\n")[0]
    return "" if first.startswith(f"{row.__name__}(") else first


def _settings(row: type[RouterConfig]) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((doc.path, doc.text.partition(";")[0]) for doc in describe(row) if "." not in doc.path)
    except (OSError, TypeError):  # a row written at a prompt has no source to read comments from
        return tuple((field.name, "") for field in fields(row) if field.init)  # pyright: ignore[reportArgumentType]
