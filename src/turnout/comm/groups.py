"""Groups of ranks that a strategy needs, made at the start and all warmed, with one timeout."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from turnout.alltoall import Axis
from turnout.comm.lines import Lines, open_lines, wanted
from turnout.comm.sharing import Sharing, sharings
from turnout.comm.world import World
from turnout.errors import ConfigError
from turnout.strategy import Strategy
from turnout.topology import Mesh

_BOTH: frozenset[Axis] = frozenset(("node", "local"))


@dataclass(frozen=True, kw_only=True)
class ExpertGroup:
    """The ranks that share the experts of a layer: those that rows travel to, and those that slice the same experts."""

    mesh: Mesh  # ranks of the same slice and other experts, on their nodes
    rank: int  # this process's, in the mesh
    wires: Mapping[frozenset[Axis], ProcessGroup | None]  # axes -> ranks that differ along them; None: this one alone
    whole: ProcessGroup  # all of them, slices being neighbours
    whole_mesh: Mesh  # those, on their nodes
    place: int  # this process's, in `whole`
    num_slices: int  # ranks that an expert is cut over
    sharings: Mapping[int, Sharing]  # Tutel's r -> whom rows and weights are shared with
    lines: Lines = Lines()  # memory that those on one host share

    @property
    def size(self) -> int:
        """Ranks of `whole`."""
        return self.whole_mesh.size

    def along(self, axes: Collection[Axis]) -> ProcessGroup | None:
        """The group of an exchange along these axes; None where it reaches nobody else."""
        return self.wires[frozenset(axes)]


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """The neighbouring ranks that share attention and dense layers, and are given the same tokens."""

    mesh: Mesh  # on their nodes
    place: int  # this process's
    wire: ProcessGroup  # all of them
    replicas: ProcessGroup | None  # ranks of other groups that hold the same parts; None: there are none
    lines: Lines = Lines()  # memory that those on one host share

    @property
    def size(self) -> int:
        return self.mesh.size


@dataclass(frozen=True, kw_only=True)
class StageGroup:
    """The ranks that hold a model in pipeline stages: neighbours hold the same one."""

    place: int  # which of them this process is
    size: int
    wire: ProcessGroup  # they, one rank of each: activations go from one to the next
    peers: ProcessGroup | None  # ranks of the same stages, with other text; None: this one alone
    ends: ProcessGroup | None  # all ranks with the first stage or the last; None: this one has neither


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups this process is in. None stands for a group of itself alone, which never communicates."""

    world: World
    experts: ExpertGroup | None  # ranks among which the experts of a layer are shared
    replicas: ProcessGroup | None  # ranks that hold the same slices of the same experts
    tensor: TensorGroup | None = None  # ranks that share attention and dense layers
    # of ZeRO: ranks that have all shards between them, and before these, where there are such, those with equal shards
    sharded: tuple[ProcessGroup, ...] = ()
    stages: StageGroup | None = None  # None: every rank has all blocks
    lines: Lines = Lines()  # memory that groups on one host share

    @property
    def like(self) -> ProcessGroup | None:
        """The ranks that have the same blocks as this one; None: it is alone."""
        if self.stages is not None:
            return self.stages.peers
        return dist.group.WORLD if self.world.size > 1 else None


def expert_mesh(ep: int, ranks_per_node: int, axis: str = "ep") -> Mesh:
    """`ep` neighbouring ranks on their nodes; `axis` is the name of their number.

    Raises: ConfigError if such groups would begin or end in the middle of a node.
    """
    if ep <= ranks_per_node and ranks_per_node % ep == 0:
        return Mesh(nodes=1, local=ep)
    if ep % ranks_per_node == 0:
        return Mesh(nodes=ep // ranks_per_node, local=ranks_per_node)
    legal = [size for size in range(1, 2 * ep + 1) if ranks_per_node % size == 0 or size % ranks_per_node == 0]
    near = min(legal, key=lambda size: (abs(size - ep), size))
    raise ConfigError(f"strategy.{axis}={ep} would cut through nodes of {ranks_per_node} ranks; nearest legal: {near}")


def make_groups(
    strategy: Strategy, world: World, *, timeout_s: float, cuda: bool = False, share_memory: bool | None = None
) -> Groups:
    """All groups of a strategy whose dp is known; every rank of the job calls it with the same arguments.

    `share_memory`: between ranks of one host rows, counts and sums travel through memory; None: as the environment
    says, or, where that says nothing, if it is proven to work.
    Raises: ConfigError if expert groups cut through nodes, or memory that must be shared cannot be.
    """
    ep, etp, apart = strategy.ep, strategy.etp, _apart(strategy)
    expert_mesh(etp, world.local_size, "etp")
    mesh = expert_mesh(ep, max(1, world.local_size // (etp * apart)))
    ranks, block = range(world.size), ep * etp * apart
    maker = _Maker(world, timedelta(seconds=timeout_s))
    blocks = [list(ranks[start + at : start + block : apart]) for start in ranks[::block] for at in range(apart)]
    columns = [members[first::etp] for members in blocks for first in range(etp)]
    column = maker.group(columns)
    wires: dict[frozenset[Axis], ProcessGroup | None] = {_BOTH: column}
    axes: tuple[tuple[Axis, int], ...] = (("node", 1), ("local", 0))
    for axis, keep in axes:
        extent = mesh.nodes if axis == "node" else mesh.local
        lines = [line for group in columns for line in _lines(group, mesh, keep)]
        wires[frozenset((axis,))] = column if extent == ep else maker.group(lines)
    place = world.rank % block // apart
    whole, sharing = maker.group(blocks), sharings(blocks, etp, place, world.size, maker.group)
    # of one stage alone: others hold experts of other layers
    each = len(blocks) // strategy.pp
    stages = [blocks[first : first + each] for first in range(0, len(blocks), each)]
    replicas = maker.group([[members[at] for members in stage] for stage in stages for at in range(ep * etp)])
    tensor, sharded = _tensor(strategy, world, maker), _sharded(strategy, world, maker)
    shared_parts = [] if tensor is None else [tensor.wire, tensor.replicas]
    staged = _staged(strategy, world, maker)
    shared_parts += [] if staged is None else [staged.wire, staged.peers, staged.ends]
    _warm([*maker.made(), *wires.values(), whole, replicas, *shared_parts, *sharded], cuda=cuda)
    everybody = dist.group.WORLD if world.size > 1 else None
    like = everybody if staged is None else staged.peers
    want = wanted() if share_memory is None else "always" if share_memory else "never"
    of_slices = [peers.wire for each in sharing.values() for peers in (each.rows, each.weights) if peers is not None]
    of_parts = [] if tensor is None else [tensor.wire, tensor.replicas]
    sharing_memory = [*wires.values(), whole, *of_slices, replicas, *of_parts, *sharded, like, everybody]
    shared = open_lines(sharing_memory, world, timeout_s=timeout_s, want=want, cuda=cuda)
    tensor = None if tensor is None else replace(tensor, lines=shared)
    experts = None
    if whole is not None:
        experts = ExpertGroup(
            mesh=mesh,
            rank=place // etp,
            wires=wires,
            whole=whole,
            whole_mesh=expert_mesh(ep * etp, max(1, world.local_size // apart), "ep * etp"),
            place=place,
            num_slices=etp,
            sharings=sharing,
            lines=shared,
        )
    return Groups(
        world=world,
        experts=experts,
        replicas=replicas,
        tensor=tensor,
        sharded=sharded,
        stages=staged,
        lines=shared,
    )


def _apart(strategy: Strategy) -> int:
    """How far apart the ranks of an expert group are: ep runs along dp, whose neighbours are tp ranks, unless folded.

    Slices of an expert lie on those very tp ranks, so that whole groups are neighbours again.
    """
    return strategy.tp if strategy.etp == 1 and not strategy.folded else 1


def _tensor(strategy: Strategy, world: World, maker: "_Maker") -> TensorGroup | None:
    tp, ranks = strategy.tp, range(world.size)
    mesh = expert_mesh(tp, world.local_size, "tp")
    wire = maker.group([list(ranks[start : start + tp]) for start in ranks[::tp]])
    # of one stage alone, as replicas of experts are
    each = world.size // strategy.pp
    stages = [ranks[start : start + each] for start in ranks[::each]]
    replicas = maker.group([stage[at::tp] for stage in stages for at in range(tp)])
    return None if wire is None else TensorGroup(mesh=mesh, place=world.rank % tp, wire=wire, replicas=replicas)


def _staged(strategy: Strategy, world: World, maker: "_Maker") -> StageGroup | None:
    """Stages are the outermost axis: their ranks send the least, and may lie furthest apart."""
    pp, ranks = strategy.pp, range(world.size)
    if pp == 1:
        return None
    each = world.size // pp
    place = world.rank // each
    wire = maker.group([ranks[at::each] for at in range(each)])
    peers = maker.group([ranks[start : start + each] for start in ranks[::each]])
    inner = ranks[each:-each]
    ends = maker.group([[*ranks[:each], *ranks[-each:]], *([inner] if inner else [])])
    assert wire is not None
    return StageGroup(place=place, size=pp, wire=wire, peers=peers, ends=ends if place in (0, pp - 1) else None)


def _sharded(strategy: Strategy, world: World, maker: "_Maker") -> tuple[ProcessGroup, ...]:
    if strategy.zero == 0:
        return ()
    # of one stage alone, along the data axis: tensor-parallel ranks have other parts, or other gradients of the same
    each, tp = world.size // strategy.pp, strategy.tp
    stages = [range(world.size)[start : start + each] for start in range(0, world.size, each)]
    columns = [stage[at::tp] for stage in stages for at in range(tp)]
    size = strategy.zero_size or len(columns[0])
    copies = maker.group([list(column[first::size]) for column in columns for first in range(size)])
    shards = maker.group([list(column[at : at + size]) for column in columns for at in range(0, len(column), size)])
    return tuple(group for group in (copies, shards) if group is not None)


def _lines(group: Sequence[int], mesh: Mesh, keep: int) -> list[list[int]]:
    """The ranks of an expert group cut into those of equal coordinate number `keep`."""
    extent = (mesh.nodes, mesh.local)[keep]
    return [[rank for place, rank in enumerate(group) if mesh.place(place)[keep] == at] for at in range(extent)]


class _Maker:
    """Makes process groups in the same order on all ranks."""

    def __init__(self, world: World, timeout: timedelta) -> None:
        self._world, self._timeout = world, timeout
        self._known: dict[tuple[tuple[int, ...], ...], ProcessGroup] = {}

    def group(self, parts: Sequence[Sequence[int]]) -> ProcessGroup | None:
        """This rank's of these equally large groups, made once; None if it is alone there."""
        if len(parts[0]) == 1:
            return None
        if len(parts) == 1:
            return dist.group.WORLD
        key = tuple(tuple(part) for part in parts)
        if key not in self._known:
            made = {rank: group for part in parts for group in [self._made(part)] for rank in part}
            self._known[key] = made[self._world.rank]
        return self._known[key]

    def made(self) -> list[ProcessGroup]:
        """All groups that this rank is in, in the order they were made."""
        return list(self._known.values())

    def _made(self, ranks: Sequence[int]) -> ProcessGroup:
        made = dist.new_group(list(ranks), timeout=self._timeout)
        # a number stands for the groups of other ranks
        return cast(ProcessGroup, made)


def _warm(groups: Iterable[ProcessGroup | None], *, cuda: bool) -> None:
    """One collective on each: connections are made now, not in the middle of the first step."""
    for group in dict.fromkeys(groups):
        for device in ("cpu", "cuda") if cuda else ("cpu",):
            if group is not None:
                dist.all_reduce(torch.zeros(1, device=device), group=group)
