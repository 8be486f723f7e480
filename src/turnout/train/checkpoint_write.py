"""Planner and storage with which torch.distributed.checkpoint (DCP) writes pieces: who writes which, and how it ends.

DCP does what needs all ranks: it takes each piece from one of the ranks that have it, sees that pieces fill their
tensors without overlap, and carries a failure to every rank. Ours are the files (safetensors with hashes, for DCP's own
are pickles) and the last step that makes them a checkpoint.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from turnout.experts.cut import Block
from turnout.train.checkpoint_manifest import SUFFIX
from turnout.train.checkpoint_pieces import Piece, chunk_of, done, key_of
from turnout.train.checkpoint_tensors import FileEntry, write_pieces
from turnout.train.durable import sync_folder

Finish = Callable[[Metadata, Mapping[str, FileEntry]], None]


class PieceSavePlanner(DefaultSavePlanner):
    """Lists the pieces of this rank; `check` refuses what cannot be stored, before any rank writes."""

    def __init__(self, pieces: Mapping[str, Piece], check: Callable[[], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces, self._check = pieces, check

    def create_local_plan(self) -> SavePlan:
        self._check()
        items = [_item(name, piece, block) for name, piece in self._pieces.items() for block in piece.layout.blocks]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece = self._pieces[write_item.index.fqn]
        start = write_item.index.offset
        return piece.view(next(block for block in piece.layout.blocks if block.whole_at == tuple(start or ())))


class PieceWriter(StorageWriter):
    """A file for each part and rank; the first rank makes the folder before any, and ends the save after all."""

    def __init__(self, staged: Path, make: Callable[[], None], finish: Finish) -> None:
        self._staged, self._make, self._finish = staged, make, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._make()
        # the folder is called by the first rank's process number
        return [replace(plan, storage_data=(str(self._staged), rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        folder, rank = Path(plan.storage_data[0]), plan.storage_data[1]
        by_part: dict[str, dict[str, Tensor]] = {}
        for item in plan.items:
            part, _, name = item.index.fqn.partition("/")
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            by_part.setdefault(part, {})[key_of(name, item.index.offset or ())] = tensor
        results = []
        for part, pieces in by_part.items():
            file = f"{part}.{rank:05d}"
            entry = write_pieces(folder / (file + SUFFIX), pieces)
            results.append(WriteResult(MetadataIndex(file), entry.size_bytes, entry))
        sync_folder(folder)
        return done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish(metadata, {each.index.fqn: each.storage_data for of_rank in results for each in of_rank})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def discard(self) -> None:
        """Delete what a save that failed left; what became a checkpoint has another name by now."""
        shutil.rmtree(self._staged, ignore_errors=True)


def _item(name: str, piece: Piece, block: Block) -> WriteItem:
    properties = TensorProperties(dtype=piece.tensor.dtype)
    data = TensorWriteData(chunk=chunk_of(block), properties=properties, size=torch.Size(piece.layout.whole))
    return WriteItem(index=MetadataIndex(name, block.whole_at), type=WriteItemType.SHARD, tensor_data=data)
