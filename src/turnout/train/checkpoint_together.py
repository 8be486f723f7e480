"""Ranks that load one checkpoint: each hashes a share of its files, and reads no more of them than it keeps."""

from pathlib import Path

import torch

from turnout.comm import World
from turnout.errors import CheckpointError
from turnout.train.checkpoint import Checkpoint, candidates, require_step
from turnout.train.checkpoint_folder import FOLDER
from turnout.train.checkpoint_manifest import Manifest, check_files, check_hashes, read_manifest
from turnout.train.checkpoint_sharded import Wanted, read_pieces


def load_together(run: Path, device: torch.device | str, world: World, wanted: Wanted) -> Checkpoint:
    """The latest good checkpoint of the run, of either format: of each tensor what `wanted` says of this rank.

    Every rank calls it. What `checkpoint.load` promises of damage holds; one rank hashes what all read.
    Raises: CheckpointError on every rank if none is good.
    """
    notes: list[str] = []
    listed = world.first(world.together(lambda: (candidates(run / FOLDER, notes), notes) if world.is_first else None))
    assert listed is not None
    paths, notes = listed
    for path in paths:
        try:
            manifest = world.together(lambda path=path: _verified(path, world))
        except CheckpointError as error:
            notes.append(f"passed over {path.name}: {error}")
            continue
        files = world.together(lambda path=path, manifest=manifest: read_pieces(path, manifest, wanted, device))
        passed_over = (*notes, f"loaded {path.name} instead") if notes else ()
        return Checkpoint(path=path, step=manifest.step, files=files, meta=dict(manifest.meta), notes=passed_over)
    raise CheckpointError(f"no checkpoint of {run} can be loaded: {'; '.join(notes) or 'it has none'}")


def _verified(path: Path, world: World) -> Manifest:
    manifest = read_manifest(path)
    require_step(path, manifest)
    if world.is_first:
        check_files(path, manifest, hashed=())
    check_hashes(path, manifest, list(manifest.files)[world.rank :: world.size])
    return manifest
