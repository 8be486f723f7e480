"""Checkpoints in pieces: every rank writes what it has and reads what it needs, and no rank ever has the whole.

The order of a save is that of a single file. Every rank's files, each flushed; when all ranks are done, on the first:
the manifest with their sizes and hashes, flushed; their folder; its name step-N; only then `latest`; only then are old
ones deleted. So a kill of any rank at any moment loses at most the save in progress.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from turnout.comm import World
from turnout.comm.world import naming
from turnout.errors import CheckpointError, ConfigError, TurnoutError
from turnout.parallel import Layout
from turnout.parallel.boxes import layout_of
from turnout.train.checkpoint_failure import failed_save
from turnout.train.checkpoint_folder import FOLDER, point_latest, prune, publish, staging, tidy
from turnout.train.checkpoint_manifest import (
    MANIFEST,
    SUFFIX,
    Manifest,
    PartEntry,
    check_meta,
    check_names,
    encode,
)
from turnout.train.checkpoint_pieces import Piece, stored
from turnout.train.checkpoint_read import PieceLoadPlanner, PieceReader
from turnout.train.checkpoint_tensors import FileEntry, check_tensors, dtype_name
from turnout.train.checkpoint_write import PieceSavePlanner, PieceWriter
from turnout.train.durable import make_folder, sync_folder, write_file

Wanted = Callable[[str, str, tuple[int, ...]], Layout | None]  # part, tensor, shape of the whole -> what is to be read


def save_pieces(
    run: Path,
    step: int,
    files: Mapping[str, Mapping[str, Piece]],
    meta: Mapping[str, Any],
    *,
    keep_last: int,
    world: World,
    group: ProcessGroup | None = None,
) -> Path:
    """What `checkpoint.save` does, of the pieces that each rank has. Every rank calls it; all see the disk of the run.

    group: what the ranks talk over, None: the group of all; a save in the background needs one of its own.
    Raises: CheckpointError on every rank if one cannot store its part, or its disk refuses; the checkpoints that were
    good stay good. ConfigError for keep_last < 1 or a negative step. TransportError if a rank is gone.
    """
    if keep_last < 1 or step < 0:
        raise ConfigError(f"keep_last={keep_last} must be at least 1 and step={step} at least 0")
    folder = run / FOLDER
    target, staged = folder / f"step-{step}", staging(folder, step)

    def check() -> None:
        check_names(files)
        check_meta(meta)
        for name, pieces in files.items():
            check_tensors(name, {each: piece.tensor for each, piece in pieces.items()})

    def make() -> None:
        make_folder(folder)
        tidy(folder)
        staged.mkdir()

    def finish(metadata: Metadata, entries: Mapping[str, FileEntry]) -> None:
        _require_seen(staged, entries)
        manifest = Manifest(step=step, files=entries, meta=meta, parts=_parts(files, metadata, entries))
        write_file(staged / MANIFEST, [encode(manifest)])
        sync_folder(staged)
        publish(staged, target)
        point_latest(folder, target)

    pieces = {f"{part}/{name}": piece for part, each in files.items() for name, piece in each.items()}
    writer = PieceWriter(staged, make, finish)
    _quietly()
    try:
        with naming("a save in pieces") if world.size > 1 else nullcontext():
            dcp.save(
                dict(pieces),
                storage_writer=writer,
                planner=PieceSavePlanner(pieces, check),
                process_group=group,
                no_dist=world.size == 1,
            )
    except CheckpointException as failed:
        raise _told(failed, target, world) from failed
    finally:
        if world.is_first:
            writer.discard()
    if world.is_first:
        prune(folder, target, keep_last)
    return target


def read_pieces(
    checkpoint: Path,
    manifest: Manifest,
    wanted: Wanted,
    device: torch.device | str,
    names: Collection[str] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Part -> name -> what lies on this rank, as it lies there, out of a verified checkpoint of either format.

    names: the parts to read; all, when None. Tensors of which `wanted` gives None are left out.
    Raises: CheckpointError if its files are not what it lists.
    """
    parts = {part: stored(checkpoint, manifest, part) for part in manifest.part_names if names is None or part in names}
    found: dict[str, dict[str, Piece]] = {part: {} for part in parts}
    for part, each in parts.items():
        for name, known in each.tensors.items():
            layout = wanted(part, name, tuple(known.size))
            if layout is not None:
                tensor = torch.empty(layout.here, dtype=known.properties.dtype)
                found[part][name] = Piece(tensor=tensor, layout=layout)
    pieces = {f"{part}/{name}": piece for part, each in found.items() for name, piece in each.items()}
    _quietly()
    try:
        # every rank knows what it wants, and the files: there is nothing to settle
        dcp.load(dict(pieces), storage_reader=PieceReader(parts), planner=PieceLoadPlanner(pieces=pieces), no_dist=True)
    except CheckpointException as failed:
        raise CheckpointError(f"cannot read {checkpoint}: {_first(failed)[1]}") from failed
    return {
        part: {name: piece.layout.placed(piece.tensor.to(device)) for name, piece in each.items()}
        for part, each in found.items()
    }


def whole_of(part: str, name: str, whole: tuple[int, ...]) -> Layout:
    """Everything is wanted: what a process alone reads."""
    return layout_of(whole, None, 0, None)


def _require_seen(staged: Path, entries: Mapping[str, FileEntry]) -> None:
    for name, entry in entries.items():
        path = staged / (name + SUFFIX)
        if not path.exists() or path.stat().st_size != entry.size_bytes:
            raise CheckpointError(
                f"rank 0 does not see {path} as the rank that wrote it does: with loop.checkpoint=sharded the run's "
                "folder must be on a disk that all machines share; nearest legal: loop.checkpoint=single"
            )


def _parts(
    files: Mapping[str, Mapping[str, Piece]], metadata: Metadata, entries: Mapping[str, FileEntry]
) -> dict[str, PartEntry]:
    tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {part: {} for part in files}
    for fqn, known in metadata.state_dict_metadata.items():
        assert isinstance(known, TensorStorageMetadata)
        part, _, name = fqn.partition("/")
        tensors[part][name] = (dtype_name(known.properties.dtype), tuple(known.size))
    return {
        part: PartEntry(files=tuple(sorted(e for e in entries if e.rpartition(".")[0] == part)), tensors=tensors[part])
        for part in files
    }


def _told(failed: CheckpointException, target: Path, world: World) -> BaseException:
    """The failure of the first rank that had one, in our words; what is no failure of a save goes on as it is."""
    rank, error = _first(failed)
    who = f"rank {rank}: " if world.size > 1 else ""
    if isinstance(error, OSError):
        return failed_save(error, target, who)
    if isinstance(error, TurnoutError):
        return CheckpointError(f"{who}{error}") if who else error
    if isinstance(error, ValueError):
        return CheckpointError(f"{who}cannot save {target}: {error}")
    return error


def _first(failed: CheckpointException) -> tuple[int, BaseException]:
    rank = min(failed.failures)
    return rank, failed.failures[rank][0]


def _quietly() -> None:
    # DCP warns whenever it is told that there is nobody to talk to
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
