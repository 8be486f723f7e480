"""Planner and storage with which torch.distributed.checkpoint (DCP) reads pieces: it finds which boxes overlap."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, ReadItem, StorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from turnout.train.checkpoint_pieces import Piece, Stored, box, chunk_of, done


@dataclass(kw_only=True)
class PieceLoadPlanner(LoadPlanner):
    """Fills the pieces of this rank from whatever pieces are stored."""

    pieces: Mapping[str, Piece]
    _blocks: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    _metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self._metadata = metadata
        for name, piece in self.pieces.items():
            self._blocks |= {(name, block.whole_at): piece.view(block) for block in piece.layout.blocks}

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None
        items: list[ReadItem] = []
        for name, piece in self.pieces.items():
            known = self._metadata.state_dict_metadata[name]
            assert isinstance(known, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, known, [chunk_of(block) for block in piece.layout.blocks])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a checkpoint holds tensors alone")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        block = self._blocks[read_item.dest_index.fqn, tuple(read_item.dest_index.offset or ())]
        return block[box(read_item.dest_offsets, read_item.lengths)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class PieceReader(StorageReader):
    """Copies boxes of stored pieces out of mapped files, of which no more is read than is wanted."""

    def __init__(self, parts: Mapping[str, Stored]) -> None:
        self._metadata = Metadata({f"{p}/{name}": md for p, part in parts.items() for name, md in part.tensors.items()})
        self._places = {index: place for part in parts.values() for index, place in part.places.items()}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        by_file: dict[Path, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            path, key = self._places[item.storage_index]
            by_file.setdefault(path, []).append((key, item))
        for path, items in by_file.items():
            with safe_open(path, framework="pt") as file:
                for key, item in items:
                    target = planner.resolve_tensor(item)
                    target.copy_(file.get_tensor(key)[box(item.storage_offsets, item.lengths)])
                    planner.commit_tensor(item, target)
        return done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
