"""The transport that moves nothing: it keeps which collectives a program makes, for `traffic.py` to price."""

from dataclasses import dataclass, replace

from turnout.alltoall.transport import Axis, Finer, Merged, Packing, Program, Transport, combine, dispatch
from turnout.topology import Mesh


@dataclass(frozen=True)
class Move:
    """One collective of a program: blocks (source, destination) change holders, or tensor-parallel ranks gather."""

    axes: tuple[Axis, ...]  # along which holders change; empty: among tensor-parallel ranks
    arrived: frozenset[Axis]  # axes on which blocks were at their destination before
    packing: Packing
    sharded: bool  # each tensor-parallel rank carries its share of the tokens
    back: bool  # on the way back to the source
    whole_tokens: bool = False  # a gather of tokens, not of the rows at the experts


@dataclass(frozen=True)
class Stage:
    """Where rows are in a program, and the collectives so far."""

    packing: Packing = "assignment"
    arrived: frozenset[Axis] = frozenset()
    sharded: bool = False
    moves: tuple[Move, ...] = ()


class CountingTransport(Transport[Stage]):
    """Runs a program and keeps its collectives; `pairs_of` and `traffic_of` price them."""

    def __init__(self, mesh: Mesh, tensor: int = 1) -> None:
        self.mesh, self.tensor = mesh, tensor

    def exchange(self, parcels: Stage, *axes: Axis) -> Stage:
        move = Move(axes, parcels.arrived, parcels.packing, parcels.sharded, back=False)
        return replace(parcels, arrived=parcels.arrived | set(axes), moves=(*parcels.moves, move))

    def dedup(self, parcels: Stage, unit: Merged) -> Stage:
        return replace(parcels, sharded=True) if unit == "tensor" else replace(parcels, packing=unit)

    def expand(self, parcels: Stage, unit: Finer) -> Stage:
        if unit != "tensor":
            return replace(parcels, packing=unit)
        move = Move((), parcels.arrived, parcels.packing, sharded=True, back=False)
        return replace(parcels, sharded=False, moves=(*parcels.moves, move))

    def exchange_back(self, parcels: Stage, *axes: Axis) -> Stage:
        arrived = parcels.arrived - set(axes)
        move = Move(axes, arrived, parcels.packing, parcels.sharded, back=True)
        return replace(parcels, arrived=arrived, moves=(*parcels.moves, move))

    def dedup_back(self, parcels: Stage, unit: Merged) -> Stage:
        if unit != "tensor":
            return replace(parcels, packing="assignment")
        move = Move((), parcels.arrived, parcels.packing, sharded=True, back=True, whole_tokens=True)
        return replace(parcels, sharded=False, moves=(*parcels.moves, move))

    def expand_back(self, parcels: Stage, unit: Finer, packing: Packing) -> Stage:
        if unit != "tensor":
            return replace(parcels, packing=packing)
        move = Move((), parcels.arrived, parcels.packing, sharded=True, back=True)
        return replace(parcels, sharded=True, moves=(*parcels.moves, move))


def round_trip(program: Program, mesh: Mesh, tensor: int = 1) -> tuple[Move, ...]:
    """The collectives of dispatch and combine."""
    transport = CountingTransport(mesh, tensor)
    return combine(program, transport, dispatch(program, transport, Stage())).moves
