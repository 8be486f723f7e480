"""Dataclass to TOML and back, overrides, and errors that name the nearest legal value."""

import re
import tomllib
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.config import describe, dump_toml, from_dict, override, to_dict
from turnout.contracts import RouterConfig
from turnout.errors import ConfigError
from turnout.registry import Table
from turnout.routers import Switch, TopK
from turnout.train.recipe import Recipe
from turnout.train.recipes import RECIPES, load_recipe


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner settings."""

    width: int = 3  # columns
    mode: Literal["near", "far"] = "near"  # how far


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outer settings."""

    title: str  # what it is called
    share: float = 0.5  # of the whole
    inner: Inner = Inner()
    router: RouterConfig = TopK()  # how tokens choose
    sizes: tuple[int, ...] = ()  # in order
    limit: int | None = None  # none: no limit


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe_survives_the_way_to_toml_and_back(name: str) -> None:
    recipe = RECIPES[name]()
    assert from_dict(Recipe, tomllib.loads(dump_toml(recipe))) == recipe


@given(
    title=st.text(),
    share=st.floats(allow_nan=False, allow_infinity=False),
    width=st.integers(-(2**60), 2**60),
    sizes=st.lists(st.integers(0, 9)).map(tuple),
    limit=st.none() | st.integers(0, 9),
)
def test_what_is_written_is_what_is_read(
    title: str, share: float, width: int, sizes: tuple[int, ...], limit: int | None
) -> None:
    config = Outer(title=title, share=share, inner=Inner(width=width), router=Switch(), sizes=sizes, limit=limit)
    assert from_dict(Outer, tomllib.loads(dump_toml(config))) == config


ERRORS = [
    ({"title": "x", "tittle": 1}, r"unknown field 'tittle'; the top level has: .*; did you mean 'title'\?"),
    ({}, r"missing field 'title'"),
    ({"title": 3}, r"title=3 must be a string"),
    ({"title": "x", "inner": {"width": 1.5}}, r"inner\.width=1\.5 must be an integer"),
    ({"title": "x", "inner": {"width": True}}, r"inner\.width=True must be an integer"),
    ({"title": "x", "inner": 4}, r"inner=4 must be a table"),
    ({"title": "x", "inner": {"mode": "nearr"}}, r"inner\.mode='nearr' must be one of: near, far; did you mean 'near'"),
    ({"title": "x", "router": {"k": 2}}, r"router needs a `name`; available: .*topk"),
    ({"title": "x", "router": {"name": "tokp"}}, r"unknown router 'tokp'; available: .*; did you mean 'topk'"),
    (
        {"title": "x", "router": {"name": "topk", "kk": 2}},
        r"unknown field 'router\.kk'; router has: .*did you mean 'k'",
    ),
    ({"title": "x", "sizes": 3}, r"sizes=3 must be a list"),
    ({"title": "x", "share": float("nan")}, r"share=nan must be a finite number"),
    ({"title": "x", "share": float("-inf")}, r"share=-inf must be a finite number"),
    ({"title": "x", "share": 10**400}, r"share must be at least -2\*\*63 and below 2\*\*63; it has 1329 bits"),
    ({"title": "x", "limit": 2**63}, r"limit must be at least .* it has 64 bits"),
]


@pytest.mark.parametrize(("data", "message"), ERRORS)
def test_a_wrong_setting_is_named_with_the_legal_ones(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, data)


def test_overrides_are_typed_by_toml_and_change_only_what_they_name() -> None:
    base = to_dict(Outer(title="x"))
    changed = override(base, ["inner.width=7", "title=plain words", "sizes=[1, 2]", "router.name=switch"])
    assert from_dict(Outer, changed) == Outer(title="plain words", inner=Inner(width=7), router=Switch(), sizes=(1, 2))
    assert base == to_dict(Outer(title="x"))


def test_a_new_name_of_the_recipe_changes_nothing_else() -> None:
    assert load_recipe("tiny", ["name=mine"]).model == load_recipe("tiny").model


def test_a_dense_recipe_does_not_become_a_mixture_by_an_override() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe is not a table of this recipe; tables here: attention"):
        load_recipe("tiny-dense", ["model.moe.num_experts=8"])


def test_a_router_name_must_be_a_text() -> None:
    with pytest.raises(ConfigError, match="needs a `name`"):
        load_recipe("tiny", ["model.moe.router.name=3"])


@pytest.mark.parametrize("text", ["width", "=3", "title.x=3"])
def test_an_override_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        override(to_dict(Outer(title="x")), [text])


def test_every_field_is_described_with_type_default_and_comment() -> None:
    docs = {doc.path: doc for doc in describe(Outer)}
    assert docs["title"].default == "required"
    assert docs["inner.mode"].kind == "near | far"
    assert docs["inner.width"].text == "columns"
    assert "topk" in docs["router"].kind


def test_a_table_refuses_a_second_row_of_the_same_name() -> None:
    table: Table[int] = Table("number")
    table.register("one")(1)
    with pytest.raises(ConfigError, match="number 'one' is registered twice"):
        table.register("one")(2)


def test_recipe_sizes_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loop\.seq_len=5000 is more than model\.max_seq_len"):
        load_recipe("tiny", ["loop.seq_len=5000"])
    with pytest.raises(ConfigError, match=r"data\.vocab_size=512 and model\.vocab_size=\d+ must be equal"):
        load_recipe("tiny", ["data.vocab_size=512"])
