"""Frozen dataclass <-> plain dict / TOML / dotted overrides.

Knows no field of any component. A field annotated with a class that has a `TABLE` (a router, a loss, a
corpus) is written as a table with a `name`: `router = {name = "topk", k = 2}`.
"""

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tomli_w

from turnout.errors import ConfigError
from turnout.registry import nearest

C = TypeVar("C")


class Settings:
    """Base of frozen dataclasses of settings: what a field cannot hold is an error however it came.

    A file's settings are checked as they are read; these, also where Python makes them, before `__post_init__`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @functools.wraps(own)
        def checked(self: Any) -> None:
            _require_fitting(self)
            own(self)

        cls.__post_init__ = checked

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the field, its value, the legal ones and the nearest."""
        _require_fitting(self)


@dataclass(frozen=True, kw_only=True)
class FieldDoc:
    """One documented setting, as `--help` prints it."""

    path: str  # dotted path from the root of the recipe
    kind: str  # type as the user would write it
    default: str  # repr of the default, or "required"
    text: str  # meaning and unit, taken from the comment beside the field


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """Build the dataclass `cls` from a plain mapping, strictly.

    Raises: ConfigError for an unknown or missing field, or a value of the wrong type; `where` prefixes names.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            legal = sorted(fields)
            raise ConfigError(
                f"unknown field {_join(where, key)!r}; {where or 'the top level'} has: {', '.join(legal)}"
                f"{nearest(key, legal)}"
            )
    missing = [n for n, f in fields.items() if n not in data and _is_required(f)]
    if missing:
        raise ConfigError(f"missing field {_join(where, missing[0])!r}")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()})


def is_whole(value: object) -> bool:
    """Whether it is an integer, numpy's included; true and false are none."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, numpy's included; true and false are none."""
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars (TOML types) for a dataclass; fields that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table = getattr(type(value), "TABLE", None)
        head = {"name": table.name_of(type(value))} if table is not None else {}
        body = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return head | {k: to_dict(v) for k, v in body.items() if v is not None}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def load_toml(path: Path) -> dict[str, Any]:
    """The parsed TOML file.

    Raises: ConfigError if it cannot be read or parsed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def dump_toml(value: Any) -> str:
    """TOML text of a dataclass; `from_dict(type(value), tomllib.loads(text)) == value`."""
    return tomli_w.dumps(to_dict(value))


def override(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`data` with dotted assignments applied: `["train.lr=3e-4", "model.router.name=switch"]`.

    A value is read as TOML where that parses (numbers, true/false, lists, quoted strings), else as a string.
    Changing the `name` of a table drops the settings of the part that was there before. A table that is not there
    is not made: a dense recipe does not become a mixture by `model.moe.hidden=64`.
    Raises: ConfigError if an assignment has no `=` or runs through what is not a table.
    """
    result: dict[str, Any] = _deep_copy(data)
    for assignment in assignments:
        path, found, text = assignment.partition("=")
        if not found or not path.strip():
            raise ConfigError(f"override {assignment!r} must look like a.b=value")
        *parents, last = path.strip().split(".")
        node = result
        for depth, key in enumerate(parents):
            tables = [name for name, value in node.items() if isinstance(value, dict)]
            if key not in tables:
                where = ".".join(parents[: depth + 1])
                raise ConfigError(
                    f"override {assignment!r}: {where} is not a table of this recipe; tables here: "
                    f"{', '.join(tables)}{nearest(key, tables)}"
                )
            node = node[key]
        value = _parse_value(text.strip())
        # the settings of one router mean nothing to another; the name of the recipe itself is a mere label
        if parents and last == "name" and node.get("name") != value:
            node.clear()
        node[last] = value
    return result


def describe(cls: type, prefix: str = "", *, inside: tuple[Any, ...] = ()) -> list[FieldDoc]:
    """Every setting reachable from `cls`, with its type, default and the comment beside it.

    A setting of one row of a table says so in its text: "topk: experts per token"; `[]` in a path is an item of a list.
    A part that takes another part of its own table (a tree of routers) is not followed into the table again: `inside`
    are the tables on the way here.
    """
    docs = []
    hints = typing.get_type_hints(cls)
    comments = _field_comments(cls)
    for field in dataclasses.fields(cls):
        path = _join(prefix, field.name)
        inner = _strip_optional(hints[field.name])
        if dataclasses.is_dataclass(inner) and not hasattr(inner, "TABLE"):
            docs += describe(typing.cast(type, inner), path, inside=inside)
            continue
        docs.append(
            FieldDoc(
                path=path,
                kind=_type_name(inner),
                default=_default_text(field),
                text=comments.get(field.name, ""),
            )
        )
        docs += _describe_rows(inner, path, inside)
    return docs


def _describe_rows(hint: Any, path: str, inside: tuple[Any, ...]) -> list[FieldDoc]:
    """Settings of every row of the table a field takes its value, or its values, from."""
    if get_origin(hint) in (tuple, list):
        hint, path = get_args(hint)[0], f"{path}[]"
    if not hasattr(hint, "TABLE") or hint.TABLE in inside:
        return []
    rows = {name: hint.TABLE[name] for name in hint.TABLE.names()}
    return [
        dataclasses.replace(doc, text=f"{name}: {doc.text}")
        for name, row in rows.items()
        if dataclasses.is_dataclass(row)
        for doc in describe(typing.cast(type, row), path, inside=(*inside, hint.TABLE))
    ]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _strip_optional(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        kept = [a for a in get_args(hint) if a is not type(None)]
        return kept[0] if len(kept) == 1 else hint
    return hint


def _convert(hint: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    hint = _strip_optional(hint)
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(hint, "TABLE"):
        return _convert_row(hint, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, _expect(value, Mapping, "a table", where), where)
    if origin is Literal:
        _require_literal(hint, value, where)
        return value
    if origin in (tuple, list):
        items = _expect(value, list | tuple, "a list", where)
        return origin(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if hint in (int, float) and type(value) in (int, float):
        _require_finite(value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path:
        return Path(_expect(value, str | Path, "a path", where))
    if hint in (int, float, str, bool):
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            raise ConfigError(f"{where}={value!r} must be {_type_name(hint)}")
        return value
    return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


SCALARS: Mapping[Any, Callable[[object], bool]] = {
    int: is_whole,
    float: is_number,
    str: lambda value: isinstance(value, str),
    bool: lambda value: isinstance(value, bool),
}


def _require_fitting(settings: Any) -> None:
    cls = type(settings)
    for field in dataclasses.fields(settings):
        hint, value = _hints(cls)[field.name], getattr(settings, field.name)
        if value is None and type(None) in get_args(hint):
            continue
        hint, where = _strip_optional(hint), f"{cls.__name__}.{field.name}"
        if get_origin(hint) is Literal:
            _require_literal(hint, value, where)
        elif hasattr(hint, "TABLE"):
            _require_part(hint, value, where)
        elif get_origin(hint) is tuple and hasattr(base := get_args(hint)[0], "TABLE"):
            for i, item in enumerate(_expect(value, list | tuple, f"a tuple, each item a {base.TABLE.kind}", where)):
                _require_part(base, item, f"{where}[{i}]")
        elif hint in SCALARS and not SCALARS[hint](value):
            raise ConfigError(f"{where}={value!r} must be {_type_name(hint)}")


def _require_literal(hint: Any, value: Any, where: str) -> None:
    if value not in get_args(hint):
        legal = [str(a) for a in get_args(hint)]
        raise ConfigError(f"{where}={value!r} must be one of: {', '.join(legal)}{nearest(str(value), legal)}")


def _require_part(base: Any, value: Any, where: str) -> None:
    if isinstance(value, base):
        return
    rows = {name: row.__name__ for name, row in base.TABLE.items()}
    # its name, or its class, where its settings belong
    word = value.__name__ if isinstance(value, type) else rows.get(value, value) if isinstance(value, str) else ""
    hint = nearest(f"{word}()", [f"{row}()" for row in rows.values()]) if word else ""
    raise ConfigError(f"{where}={value!r} must be a {base.TABLE.kind}: settings of {', '.join(rows.values())}{hint}")


def _require_finite(value: Any, where: str) -> None:
    # no setting means anything at infinity: where there may be no limit, 0 says so
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value} must be a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} must be at least -2**63 and below 2**63; it has {value.bit_length()} bits")


def _convert_row(base: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    data = dict(_expect({"name": value} if isinstance(value, str) else value, Mapping, "a name or a table", where))
    name = data.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where} needs a `name`; available: {', '.join(base.TABLE.names())}")
    return from_dict(base.TABLE[name], data, where)


def _expect(value: Any, kind: Any, words: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{where}={value!r} must be {words}")
    return value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _deep_copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in data.items()}


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (tuple, list):
        return f"list of {_type_name(get_args(hint)[0])}"
    if hasattr(hint, "TABLE"):
        return f"{hint.TABLE.kind} ({', '.join(hint.TABLE.names())})"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(to_dict(field.default_factory()))
    return "required"


def _field_comments(cls: type) -> dict[str, str]:
    """Trailing `# comment` of each annotated field, over the class and its dataclass bases."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
                _, found, text = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
                if found:
                    comments[node.target.id] = text.strip()
    return comments
