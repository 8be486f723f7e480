"""Bytes and messages of a step link by link: from one device to each device that it sends to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from turnout.plan.collectives import Collective

INSIDE, RAIL, ACROSS = "inside the node", "same place, other node", "other place, other node"


@dataclass(frozen=True, kw_only=True)
class LinkTraffic:
    """What one device sends in a step to each of the devices that are alike to it."""

    collective: str
    link: str  # where those devices are: INSIDE, RAIL or ACROSS
    peers: float  # how many they are, the mean over devices: of a ring's hops only some leave the node
    link_bytes: float  # to each of them
    messages: float

    def to_json(self) -> dict[str, Any]:
        """The row of `plan volume --json`."""
        return dict(vars(self))


def links_of(parts: Iterable[Collective], *, tensor: int = 1) -> tuple[LinkTraffic, ...]:
    """Every collective by link; over all peers the bytes are those of the collectives.

    `tensor`: tensor-parallel ranks among which an exchange itself gathers (`coordinated`).
    """
    return tuple(link for part in parts for link in _links(part, tensor))


def _links(part: Collective, tensor: int) -> Iterable[LinkTraffic]:
    rail = (part.inter_bytes - part.cross_bytes, part.inter_messages - part.cross_messages)
    sent = {
        INSIDE: (part.intra_bytes, part.intra_messages),
        RAIL: rail,
        ACROSS: (part.cross_bytes, part.cross_messages),
    }
    for link, peers in _peers(part, tensor).items():
        size, messages = sent[link]
        # what is left of the difference of two equal sums is no traffic
        if size > 1e-9 * part.total_bytes:
            yield LinkTraffic(
                collective=part.name, link=link, peers=peers, link_bytes=size / peers, messages=messages / peers
            )


def _peers(part: Collective, tensor: int) -> dict[str, float]:
    mesh = part.mesh
    if part.exchanges:
        near = mesh.local - 1 + (tensor - 1 if part.axis == "ep" else 0)
        return {INSIDE: near, RAIL: mesh.nodes - 1, ACROSS: (mesh.nodes - 1) * (mesh.local - 1)}
    # a stage sends on to the next and back to the one before, a ring to the next alone
    neighbours = min(2, mesh.size - 1) if part.axis == "pp" else 1
    leaving = mesh.nodes / mesh.size if part.axis != "pp" else (mesh.nodes - 1) / max(1, mesh.size - 1)
    leaving = leaving if mesh.nodes > 1 else 0.0
    return {INSIDE: neighbours * (1 - leaving), RAIL: neighbours * leaving}
