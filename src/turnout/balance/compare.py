"""What placements would have cost a recorded run: neighbours in order, EPLB's, and the one that is searched for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnout.balance.copies import best_copied
from turnout.balance.cost import Prices, cost_of
from turnout.balance.eplb import eplb
from turnout.balance.moving import by_rank, moved_bytes
from turnout.balance.routed import Holders, Routed
from turnout.balance.search import Limits, balanced
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Mesh
from turnout.trace import TRACE_NAME, read_sources, read_trace

WAYS = ("contiguous", "eplb", "turnout")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The layers of a run, as mean steps."""

    layers: Mapping[str, Routed]  # by name in the trace
    knows_sources: bool  # from which ranks rows came; else all sent alike


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of placing the experts of one layer, or the mean of all layers."""

    layer: str
    way: str
    max_load: float  # rows of the fullest rank over the mean
    inter_bytes_a_token: float  # between hosts, four trips
    step_s: float  # computation and exchange of the layer
    move_inter_bytes: float | None  # to get there from neighbours in order; None: EPLB's copies, twice on a rank
    move_intra_bytes: float | None
    move_s: float | None
    pays_after: float | None  # steps that save what the move took; None: never


def recorded(run: Path, mesh: Mesh, *, last: int = 0) -> Recorded:
    """What a run routed, as on the ranks of `mesh`; `last`: steps at its end that count, 0 for all.

    Raises: ConfigError if it has no trace, routed nothing, or a layer has fewer experts than there are ranks.
    """
    trace, sources = read_trace(run), read_sources(run)
    if not trace.layers or not len(trace.steps):
        raise ConfigError(f"{run} has no {TRACE_NAME}, or no step in it; give the folder of a run with experts")
    knows = bool(sources) and all(
        len(sources.get(name, ())) == mesh.size and sources[name].shape[1] == number
        for name, number in zip(trace.layers, trace.num_experts, strict=True)
    )
    layers = {}
    for name, counts, dropped in zip(trace.layers, trace.counts, trace.dropped, strict=True):
        if counts.shape[1] < mesh.size:
            raise ConfigError(
                f"--ranks {mesh.size}: layer {name!r} of {run} has {counts.shape[1]} experts, and each rank holds at "
                f"least one; nearest legal: {counts.shape[1]}"
            )
        loads_E = (counts[-last:].astype(float) - dropped[-last:]).mean(axis=0)
        if not loads_E.sum():
            raise ConfigError(f"layer {name!r} of {run} routed nothing; give a run that trained")
        layers[name] = Routed(rows_RE=sources[name], mesh=mesh) if knows else Routed.alike(list(loads_E), mesh)
    return Recorded(layers=layers, knows_sources=knows)


def compared(
    layers: Mapping[str, Routed],
    prices: Prices,
    *,
    top_k: int,
    expert_bytes: int,
    groups: int = 1,
    redundant: int = 0,
    limits: Limits | None = None,
) -> list[Row]:
    """Rows of every layer, way by way, and after them the means of all layers under the name "all".

    With `redundant` copies two ways more are compared, "eplb + copies" and "turnout + copies"; `groups`: runs of
    experts that stay on a host in both, and in EPLB's placement without copies.
    Raises: ConfigError as `eplb` and `balanced` do.
    """
    found = []
    for name, routed in layers.items():
        mesh, present = routed.mesh, Placement.even(routed.num_experts, routed.mesh.size)
        by_eplb = eplb(list(routed.loads_E), mesh, groups=groups)
        rank_of = {expert: rank for rank, experts in enumerate(by_eplb) for expert in experts}
        ways: dict[str, Placement | Holders] = {
            "contiguous": present,
            "eplb": Placement.of([rank_of[expert] for expert in range(routed.num_experts)], mesh.size),
        }
        if redundant:
            ways["eplb + copies"] = eplb(list(routed.loads_E), mesh, groups=groups, redundant=redundant)
        ways["turnout"] = balanced(routed, prices, present, limits)
        if redundant:
            ways["turnout + copies"] = best_copied(routed, prices, present, copies=redundant, groups=groups)
        found += [_row(name, way, where, present, routed, prices, top_k, expert_bytes) for way, where in ways.items()]
    ways_of = dict.fromkeys(row.way for row in found)
    return found + [_mean([row for row in found if row.way == way]) for way in ways_of]


def _row(
    layer: str,
    way: str,
    where: Placement | Holders,
    present: Placement,
    routed: Routed,
    prices: Prices,
    top_k: int,
    expert_bytes: int,
) -> Row:
    now, cost = (cost_of(each, routed, prices, present=present) for each in (present, where))
    tokens = routed.rows_RE.sum() / top_k
    moves: dict[str, Any] = dict.fromkeys(("move_inter_bytes", "move_intra_bytes", "move_s", "pays_after"))
    if isinstance(where, Placement):
        sent = by_rank(moved_bytes(present, where, [expert_bytes]), routed.mesh)
        saved_s = now.step_s - cost.step_s
        moves = {
            "move_inter_bytes": sum(each.inter_bytes for each in sent),
            "move_intra_bytes": sum(each.intra_bytes for each in sent),
            "move_s": cost.move_s,
            "pays_after": cost.move_s / saved_s if saved_s > 0 else 0.0 if where == present else None,
        }
    return Row(
        layer=layer,
        way=way,
        max_load=cost.max_load,
        inter_bytes_a_token=cost.inter_bytes / tokens,
        step_s=cost.step_s,
        **moves,
    )


def _mean(rows: Sequence[Row]) -> Row:
    def mean(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values) / len(values)

    names = ("move_inter_bytes", "move_intra_bytes", "move_s", "pays_after")
    return Row(
        layer="all",
        way=rows[0].way,
        max_load=mean("max_load") or 0.0,
        inter_bytes_a_token=mean("inter_bytes_a_token") or 0.0,
        step_s=mean("step_s") or 0.0,
        **{name: mean(name) for name in names},
    )
