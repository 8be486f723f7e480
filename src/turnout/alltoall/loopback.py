"""The transport that moves all ranks' rows in one process, each row with its own address: the tests' referee."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from turnout.alltoall.loopback_rows import Row, Rows, by_position, first_only, summed_by_token
from turnout.alltoall.traffic import Pairs, RowSize
from turnout.alltoall.transport import Axis, Finer, Merged, Packing, Transport
from turnout.topology import Mesh


@dataclass(frozen=True)
class LoopbackTransport(Transport[Rows]):
    """Moves rows between lists and writes into `moved` what crossed, priced by `size`."""

    mesh: Mesh
    size: RowSize
    tensor: int = 1
    moved: Pairs = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def exchange(self, parcels: Rows, *axes: Axis) -> Rows:
        return replace(parcels, ranks=self._send(parcels, axes, lambda row: row.slots[0][1], back=False))

    def exchange_back(self, parcels: Rows, *axes: Axis) -> Rows:
        return replace(parcels, ranks=self._send(parcels, axes, lambda row: row.source, back=True))

    def dedup(self, parcels: Rows, unit: Merged) -> Rows:
        if unit == "tensor":
            kept = enumerate(parcels.ranks)
            return replace(parcels, ranks=tuple(self._share(rows, rank) for rank, rows in kept))
        return Rows(tuple(self._merge(rows, unit, lambda a, b: a) for rows in parcels.ranks), unit)

    def dedup_back(self, parcels: Rows, unit: Merged) -> Rows:
        if unit == "tensor":
            gathered = self._within(parcels, lambda rows, _: summed_by_token(rows), back=True)
            return replace(parcels, ranks=tuple(map(by_position, gathered)))
        return Rows(tuple(by_position(first_only(rows)) for rows in parcels.ranks))

    def expand(self, parcels: Rows, unit: Finer) -> Rows:
        if unit == "tensor":
            gathered = self._within(parcels, lambda rows, _: rows, back=False)
            return replace(parcels, ranks=tuple(map(by_position, gathered)))
        return Rows(tuple(self._split(rows, unit) for rows in parcels.ranks), unit)

    def expand_back(self, parcels: Rows, unit: Finer, packing: Packing) -> Rows:
        if unit == "tensor":
            parts = self._within(parcels, self._share, back=True)
            return replace(parcels, ranks=tuple(self._merge(rows, "assignment", lambda a, b: a + b) for rows in parts))
        return Rows(tuple(self._merge(rows, packing, lambda a, b: a + b) for rows in parcels.ranks), packing)

    # --- what stays on a rank ---

    def _share(self, rows: Sequence[Row], rank: int) -> tuple[Row, ...]:
        return tuple(row for row in rows if row.token % self.tensor == rank % self.tensor)

    def _unit(self, packing: str, destination: int) -> int:
        return destination // self.mesh.local if packing == "node" else destination

    def _merge(self, rows: Sequence[Row], packing: str, join: Callable[[Any, Any], Any]) -> tuple[Row, ...]:
        """One row per token and destination unit; per assignment when packing says so."""
        merged: dict[tuple[int, ...], Row] = {}
        for row in rows:
            position, destination = row.slots[0]
            key = (row.source, row.token, position if packing == "assignment" else self._unit(packing, destination))
            have = merged.get(key)
            payload = row.payload if have is None else join(have.payload, row.payload)
            merged[key] = replace(row, slots=(have.slots if have else ()) + row.slots, payload=payload)
        return tuple(merged.values())

    def _split(self, rows: Sequence[Row], unit: str) -> tuple[Row, ...]:
        """The transpose: copies per rank, or one row for every assignment."""
        split = []
        for row in rows:
            groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
            for position, destination in row.slots:
                groups[position if unit == "assignment" else destination].append((position, destination))
            split += [replace(row, slots=tuple(group)) for group in groups.values()]
        return by_position(split) if unit == "assignment" else tuple(split)

    # --- what crosses ---

    def _send(
        self, parcels: Rows, axes: tuple[Axis, ...], towards: Callable[[Row], int], *, back: bool
    ) -> tuple[tuple[Row, ...], ...]:
        boxes: list[dict[int, list[Row]]] = [defaultdict(list) for _ in parcels.ranks]
        for sender, rows in enumerate(parcels.ranks):
            for peer in self._peers(sender, axes):
                self._note(sender, peer, (), parcels.packing, back=back)
            for row in rows:
                receiver = self._towards(sender, towards(row), axes)
                boxes[receiver][sender].append(row)
        for receiver, box in enumerate(boxes):
            for sender, rows in box.items():
                self._note(sender, receiver, rows, parcels.packing, back=back, messages=0)
        return tuple(tuple(row for sender in sorted(box) for row in box[sender]) for box in boxes)

    def _towards(self, rank: int, target: int, axes: tuple[Axis, ...]) -> int:
        place, index = divmod(rank, self.tensor)
        node, local = self.mesh.place(place)
        to_node, to_local = self.mesh.place(target)
        node, local = to_node if "node" in axes else node, to_local if "local" in axes else local
        return self.mesh.rank(node, local) * self.tensor + index

    def _peers(self, rank: int, axes: tuple[Axis, ...]) -> set[int]:
        return {self._towards(rank, target, axes) for target in range(self.mesh.size)} - {rank}

    def _within(
        self, parcels: Rows, part: Callable[[Sequence[Row], int], Sequence[Row]], *, back: bool
    ) -> list[list[Row]]:
        """Every rank sends `part(its rows, receiver)` to each tensor-parallel rank of its place."""
        received: list[list[Row]] = [[] for _ in parcels.ranks]
        for sender, rows in enumerate(parcels.ranks):
            first = sender // self.tensor * self.tensor
            for receiver in range(first, first + self.tensor):
                sent = part(rows, receiver)
                self._note(sender, receiver, sent, parcels.packing, back=back)
                received[receiver] += sent
        return received

    def _note(
        self, sender: int, receiver: int, rows: Sequence[Row], packing: str, *, back: bool, messages: int = 1
    ) -> None:
        if sender == receiver:
            return
        row_bytes = self.size.back_bytes if back else self.size.row_bytes
        label_bytes = self.size.label_back_bytes if back else self.size.label_bytes
        labels = sum(len(row.slots) for row in rows) if packing != "assignment" else 0
        entry = self.moved[sender, receiver]
        entry[0] += len(rows) * row_bytes + labels * label_bytes
        entry[1] += messages
