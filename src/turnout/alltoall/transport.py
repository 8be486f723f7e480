"""The contract of an all-to-all: a program is a short function over a Transport with three verbs.

Ranks are (node, local) of a Mesh; with `tensor` > 1 every such place is a group of tensor-parallel ranks that hold the
same tokens. A program starts with one row per assignment at the rank that has the token and ends with the same row at
the rank that has the expert. Each verb is linear in the rows and has a transpose; played backwards, a program is the
combine, and the gradient of either is the other. Programs never look at the routing, so all ranks run the same steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from turnout.errors import ConfigError
from turnout.registry import Table
from turnout.topology import Mesh

Axis = Literal["node", "local"]
Packing = Literal["assignment", "rank", "node"]  # one row per choice; per token and rank; per token and node
Merged = Literal["rank", "node", "tensor"]  # what dedup keeps one copy per
Finer = Literal["rank", "assignment", "tensor"]  # what expand copies to
P = TypeVar("P")


class Transport(ABC, Generic[P]):
    """Interprets a program: moves rows, or counts what moving them would cost.

    `P` is what the interpreter passes from verb to verb: rows with their layout. Splits may be uneven or zero; those of
    every step follow from the rows each rank has for each other (`RoutedTokens.rows`), so one exchange of counts before
    the first verb serves the whole program and its way back.
    """

    mesh: Mesh  # places of the expert group
    tensor: int = 1  # tensor-parallel ranks of a place, all on its node

    @abstractmethod
    def exchange(self, parcels: P, *axes: Axis) -> P:
        """Send every row to the rank that has its destination's coordinate on `axes`, and its holder's on the others.

        Received blocks lie in order of the peer; one message goes to every peer, an empty one too.
        """

    @abstractmethod
    def dedup(self, parcels: P, unit: Merged) -> P:
        """Keep one copy of a token per destination `unit`, labelled with its assignments there.

        `tensor` keeps the tokens whose index modulo the tensor group is this rank's, for its peers hold the same.
        """

    @abstractmethod
    def expand(self, parcels: P, unit: Finer) -> P:
        """Copy rows to the finer `unit`; assignments come in order of (source rank, position at the source).

        `tensor` gathers the rows of all tensor-parallel ranks of the place.
        """

    @abstractmethod
    def exchange_back(self, parcels: P, *axes: Axis) -> P:
        """Transpose of `exchange`: rows return to where they came from."""

    @abstractmethod
    def dedup_back(self, parcels: P, unit: Merged) -> P:
        """Transpose of `dedup`: the copy's value for one of its assignments, zero for the others.

        `tensor` gathers the sums of whole tokens, so that every rank of the place has all of its tokens again.
        """

    @abstractmethod
    def expand_back(self, parcels: P, unit: Finer, packing: Packing) -> P:
        """Transpose of `expand`: copies are summed into rows of `packing`, which they had before it."""


Program = Callable[[Transport[Any], Any], Any]
PROGRAMS: Table[Program] = Table("all-to-all program")


@dataclass(frozen=True)
class Step:
    """One verb of a program, as played."""

    verb: Literal["exchange", "dedup", "expand"]
    arguments: tuple[Any, ...]  # axes of an exchange, else the unit
    before: Packing  # packing of the rows that enter it
    after: Packing

    def play(self, transport: Transport[P], parcels: P) -> P:
        """The verb on `transport`: all of them in turn are the program."""
        if self.verb == "exchange":
            return transport.exchange(parcels, *self.arguments)
        if self.verb == "dedup":
            return transport.dedup(parcels, self.arguments[0])
        return transport.expand(parcels, self.arguments[0])

    def play_back(self, transport: Transport[P], parcels: P) -> P:
        """The transposed verb on `transport`."""
        if self.verb == "exchange":
            return transport.exchange_back(parcels, *self.arguments)
        if self.verb == "dedup":
            return transport.dedup_back(parcels, self.arguments[0])
        return transport.expand_back(parcels, self.arguments[0], self.before)


def dispatch(program: Program, transport: Transport[P], parcels: P) -> P:
    """Rows at their experts. Its gradient is `combine`."""
    return program(transport, parcels)


def combine(program: Program, transport: Transport[P], parcels: P) -> P:
    """Rows back at their tokens, copies summed where the program had merged them. Its gradient is `dispatch`.

    A weight that differs between the choices of a token is applied before, at the expert, when the program merges.
    """
    for step in reversed(steps_of(program)):
        parcels = step.play_back(transport, parcels)
    return parcels


def steps_of(program: Program) -> tuple[Step, ...]:
    """The verbs of a program in order; they do not depend on mesh or routing.

    Raises: ConfigError if the program does not deliver: an axis left out or taken twice, rows still merged at the end.
    """
    steps: tuple[Step, ...] = program(_Recorder(), ())
    axes = [axis for step in steps if step.verb == "exchange" for axis in step.arguments]
    if sorted(axes) != ["local", "node"]:
        raise ConfigError(f"an all-to-all program must exchange along node and local once each; it has {axes}")
    if steps[-1].after != "assignment":
        raise ConfigError(f"an all-to-all program must end with one row per assignment; it ends per {steps[-1].after}")
    return steps


class _Recorder(Transport[tuple[Step, ...]]):
    """Passes the steps so far from verb to verb."""

    def exchange(self, parcels: tuple[Step, ...], *axes: Axis) -> tuple[Step, ...]:
        return _with(parcels, "exchange", axes, _packing(parcels))

    def dedup(self, parcels: tuple[Step, ...], unit: Merged) -> tuple[Step, ...]:
        if _packing(parcels) != "assignment":
            raise ConfigError(f"dedup({unit!r}) needs one row per assignment; they are merged per {_packing(parcels)}")
        return _with(parcels, "dedup", (unit,), _packing(parcels) if unit == "tensor" else unit)

    def expand(self, parcels: tuple[Step, ...], unit: Finer) -> tuple[Step, ...]:
        return _with(parcels, "expand", (unit,), _packing(parcels) if unit == "tensor" else unit)

    def exchange_back(self, parcels: tuple[Step, ...], *axes: Axis) -> tuple[Step, ...]:
        raise ConfigError("an all-to-all program is written forwards; combine plays it backwards")

    def dedup_back(self, parcels: tuple[Step, ...], unit: Merged) -> tuple[Step, ...]:
        return self.exchange_back(parcels)

    def expand_back(self, parcels: tuple[Step, ...], unit: Finer, packing: Packing) -> tuple[Step, ...]:
        return self.exchange_back(parcels)


def _packing(steps: tuple[Step, ...]) -> Packing:
    return steps[-1].after if steps else "assignment"


def _with(steps: tuple[Step, ...], verb: Any, arguments: tuple[Any, ...], after: Any) -> tuple[Step, ...]:
    return (*steps, Step(verb, arguments, _packing(steps), after))
