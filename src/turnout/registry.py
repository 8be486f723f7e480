"""Tables of interchangeable parts: one file and one row add an idea everywhere at once."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from turnout.errors import ConfigError

T = TypeVar("T")
Part = TypeVar("Part")


def nearest(name: str, legal: list[str]) -> str:
    """`; did you mean 'x'?` for the legal name closest to `name`, or nothing when none is close.

    One that has it as a word, as `dgx-h100` has `h100`, is closer than one spelled like it.
    """
    having = [each for each in legal if name in each.replace("_", "-").split("-")]
    close = having or difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class Table(Generic[T]):
    """Name -> part, for one kind of part (`kind` is the word used in error texts)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._rows: dict[str, T] = {}
        self._names: dict[int, str] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """Class or function decorator that adds a row; what it decorates keeps its own type.

        Raises: ConfigError if the name is taken.
        """

        def add(part: Part) -> Part:
            if name in self._rows:
                raise ConfigError(f"{self.kind} {name!r} is registered twice")
            self._rows[name] = cast(T, part)
            self._names[id(part)] = name
            return part

        return add

    def __getitem__(self, name: str) -> T:
        """The part called `name`.

        Raises: ConfigError naming all rows and the nearest one.
        """
        if name not in self._rows:
            raise ConfigError(
                f"unknown {self.kind} {name!r}; available: {', '.join(self.names())}{nearest(name, self.names())}"
            )
        return self._rows[name]

    def name_of(self, part: T) -> str:
        """The name under which `part` is registered.

        Raises: ConfigError if it is not in this table.
        """
        if id(part) not in self._names:
            raise ConfigError(f"{part!r} is not a registered {self.kind}; available: {', '.join(self.names())}")
        return self._names[id(part)]

    def names(self) -> list[str]:
        return sorted(self._rows)

    def items(self) -> Iterator[tuple[str, T]]:
        return iter(sorted(self._rows.items()))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __len__(self) -> int:
        return len(self._rows)
