"""What a run's recipe says of its router: whether it learns, how it chooses, and what of it can be changed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import turnout.routers  # noqa: F401  (fills the table)
from turnout.config import describe, from_dict
from turnout.contracts import RouterConfig
from turnout.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The router of a run, in words. As it stands: a router nothing is known of, which is taken to learn."""

    learns: bool = True
    rule: str = ""  # how it chooses, one sentence
    settings: tuple[tuple[str, str], ...] = ()  # (name, meaning) of each


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    router: RouterConfig


def routing_of(recipe: Mapping[str, Any]) -> Routing:
    """The routing of a parsed `recipe.toml`; of a recipe without experts, the one nothing is known of.

    Raises: ConfigError if this release has no such router or setting.
    """
    router = recipe
    for key in ("model", "moe", "router"):
        if not isinstance(router, Mapping) or key not in router:
            return Routing()
        router = router[key]
    try:
        chosen = from_dict(_Chosen, {"router": router}).router
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"model.moe.router: {error}") from error
    return Routing(learns=chosen.scores_have_gradient, rule=_rule(type(chosen)), settings=_settings(type(chosen)))


def _rule(row: type[RouterConfig]) -> str:
    """The first sentence of the row's docstring; a dataclass without one has its signature there."""
    first = (row.__doc__ or "").strip().partition("\n")[0]
    return "" if first.startswith(f"{row.__name__}(") else first


def _settings(row: type[RouterConfig]) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((doc.path, doc.text.partition(";")[0]) for doc in describe(row) if "." not in doc.path)
    except (OSError, TypeError):  # a row written at a prompt has no source to read comments from
        return tuple((field.name, "") for field in fields(row) if field.init)  # pyright: ignore[reportArgumentType]
