"""Slices of weights that ranks gather for one pass; the gradient of a slice is the sum of what they made of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from turnout.comm.ledger import Ledger
from turnout.comm.lines import Lines
from turnout.comm.sharing import Peers
from turnout.comm.wire import Route, SentRows, send_rows
from turnout.experts.cut import Cut


@dataclass(frozen=True, kw_only=True)
class WeightGather:
    """What the peers keep of the experts of a layer, all of it in one message to each of them.

    Parts differ in size where ranks do not divide the experts, and a bias lies on one slice alone, so one all-to-all
    stands for the all-gather, and its gradient for the reduce-scatter.
    """

    cuts: Mapping[str, Cut]  # by the weight's own name
    peers: Peers
    ledger: Ledger
    layer: str
    lines: Lines = Lines()  # memory that the peers may share

    def begin(self, weights: Mapping[str, Tensor]) -> SentRows:
        """Begin to send this rank's slices; `weights`: those."""
        mine_X = torch.cat([weights[name].reshape(-1) for name in self.cuts])
        copies_NX = mine_X.expand(len(self.peers.places), len(mine_X))
        return send_rows(copies_NX.reshape(-1), self._route)

    def land(self, sent: SentRows) -> dict[str, Tensor]:
        """The weights of the part that the peers make together, or of all experts where they are all ranks."""
        by_peer = sent.land().split(list(self._route.rows[1]))
        parts = [self._unpacked(flat_X, place) for flat_X, place in zip(by_peer, self.peers.places, strict=True)]
        return {name: cut.merged([part[name] for part in parts]) for name, cut in self.cuts.items()}

    def _unpacked(self, flat_X: Tensor, place: int) -> dict[str, Tensor]:
        shapes = [cut.part_shape(place) for cut in self.cuts.values()]
        pieces = flat_X.split([math.prod(shape) for shape in shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(self.cuts, pieces, shapes, strict=True)}

    @cached_property
    def _route(self) -> Route:
        sizes = {
            place: sum(math.prod(cut.part_shape(place)) for cut in self.cuts.values()) for place in self.peers.places
        }
        mine = (sizes[self.peers.place],) * len(sizes)
        return Route(
            group=self.peers.wire,
            peers=self.peers.places,
            rank=self.peers.place,
            rows=(mine, tuple(sizes.values())),
            labels=((), ()),
            ledger=self.ledger,
            layer=self.layer,
            kind="weights",
            shared=self.lines.of(self.peers.wire),
        )
