"""Ranks with parts of the same experts: they share the rows that each was sent, and add up what each made of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from turnout.comm.ledger import Ledger
from turnout.comm.lines import Lines
from turnout.comm.picks import runs, starts
from turnout.comm.sharing import Peers
from turnout.comm.wire import Route, SentRows, Splits, send_rows
from turnout.segments import Segments, gather, permutation, weighted_sum


@dataclass(frozen=True, kw_only=True)
class SliceRows:
    """The rows of one chunk at the parts of an expert; `join` and `add` are each other's gradient, but for the values.

    Their numbers differ from part to part, which neither gloo's all-gather nor its reduce-scatter allows: one
    all-to-all sends the bytes of either.
    """

    peers: Peers  # who has the parts, in their order
    counts: Sequence[Sequence[int]]  # [part][expert of this rank]: rows that reached it there
    device: torch.device
    ledger: Ledger
    layer: str
    lines: Lines = Lines()  # memory that the peers may share

    @property
    def totals(self) -> list[int]:
        """Rows of each expert, of all parts together."""
        return [sum(of_expert) for of_expert in zip(*self.counts, strict=True)]

    def join(self, x_MD: Tensor) -> SentRows:
        """Begin to give every part what this rank has. Shapes: x_MD by expert."""
        copies_ND = x_MD.expand(len(self.counts), *x_MD.shape).reshape(-1, x_MD.shape[1])
        return send_rows(copies_ND, self._route)

    def joined(self, sent: SentRows) -> Tensor:
        """What every part had, expert by expert and in each part by part. Shapes: returns (N, D)."""
        return gather(sent.land(), self._by_expert)

    def add(self, y_ND: Tensor) -> SentRows:
        """Begin to send what this rank made of the rows of all parts home. Shapes: y_ND as of `joined`."""
        return send_rows(weighted_sum(y_ND, None, self._by_expert), self._route.turned())

    def added(self, sent: SentRows) -> Tensor:
        """What the parts made of the rows this rank was sent, added in float32 or wider. Shapes: returns (M, D)."""
        parts_ND = sent.land()
        parts_SMD = parts_ND.view(len(self.counts), sum(self._mine), parts_ND.shape[1])
        return parts_SMD.to(torch.promote_types(parts_ND.dtype, torch.float32)).sum(dim=0).to(parts_ND.dtype)

    @property
    def _mine(self) -> Sequence[int]:
        return self.counts[self.peers.at]

    @cached_property
    def _route(self) -> Route:
        every = tuple(sum(of_part) for of_part in self.counts)
        splits: Splits = ((sum(self._mine),) * len(every), every)
        return Route(
            group=self.peers.wire,
            peers=self.peers.places,
            rank=self.peers.place,
            rows=splits,
            labels=((), ()),
            ledger=self.ledger,
            layer=self.layer,
            kind="slices",
            shared=self.lines.of(self.peers.wire),
        )

    @cached_property
    def _by_expert(self) -> Segments:
        """Rows that lie part by part, and in each expert by expert, in the order of experts."""
        num_parts, num_experts = len(self.counts), len(self._mine)
        begin = starts([count for of_part in self.counts for count in of_part])
        order = [at * num_experts + expert for expert in range(num_experts) for at in range(num_parts)]
        lengths = [self.counts[number // num_experts][number % num_experts] for number in order]
        return permutation(runs([begin[number] for number in order], lengths, self.device))
