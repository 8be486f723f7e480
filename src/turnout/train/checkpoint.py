"""Saving and loading a run's checkpoints: whole or not at all, verified before any byte is used, no pickle.

The order of a save: every file and the manifest, each flushed; their folder; its name step-N; only then `latest`;
only then are old ones deleted. So a kill at any moment loses at most the save in progress.
"""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnout.errors import CheckpointError, ConfigError
from turnout.train.checkpoint_failure import failed_save
from turnout.train.checkpoint_folder import (
    FOLDER,
    LATEST,
    newest_first,
    point_latest,
    prune,
    publish,
    read_latest,
    staging,
    step_of,
    tidy,
)
from turnout.train.checkpoint_manifest import (
    MANIFEST,
    SUFFIX,
    Manifest,
    check_files,
    check_meta,
    check_names,
    encode,
    read_manifest,
)
from turnout.train.checkpoint_sharded import read_pieces, whole_of
from turnout.train.checkpoint_tensors import check_tensors, read_tensors, write_tensors
from turnout.train.durable import make_folder, sync_folder, write_file


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    step: int
    files: dict[str, dict[str, Tensor]]  # part, such as model -> tensor name -> tensor
    meta: dict[str, Any]  # JSON
    notes: tuple[str, ...]  # what a user must hear: which checkpoints were passed over, and why


def save(
    run: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Write `run/checkpoints/step-N` durably, make it the latest, and delete all but the last `keep_last`.

    Tied tensors are stored once; tensors that overlap are stored apart. Saving a step again replaces it.
    Raises: CheckpointError if something cannot be stored exactly, or the disk refuses: the checkpoints that were
    good stay good, and the run can go on. ConfigError for keep_last < 1 or a negative step.
    """
    if keep_last < 1 or step < 0:
        raise ConfigError(f"keep_last={keep_last} must be at least 1 and step={step} at least 0")
    _check_contents(files, meta)
    folder = run / FOLDER
    target = folder / f"step-{step}"
    staged = staging(folder, step)
    try:
        make_folder(folder)
        tidy(folder)
        _write(staged, step, files, meta)
        publish(staged, target)
        point_latest(folder, target)
    except OSError as error:
        raise failed_save(error, target) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    prune(folder, target, keep_last)
    return target


def load(
    run_or_checkpoint: Path, device: torch.device | str = "cpu", *, names: Collection[str] | None = None
) -> Checkpoint:
    """The checkpoint at this path, or the latest of the run at this path, verified before any byte is used.

    When the latest of a run is damaged, the newest good one before it is taken, and `notes` says so.
    names: the parts to read and hash, such as {"model"}; all, when None.
    Raises: CheckpointError if a checkpoint named explicitly is damaged, or a run has none that is good.
    """
    if (run_or_checkpoint / MANIFEST).exists() or step_of(run_or_checkpoint) is not None:
        return _read(run_or_checkpoint, device, names, notes=())
    notes: list[str] = []
    for candidate in candidates(run_or_checkpoint / FOLDER, notes):
        try:
            passed_over = (*notes, f"loaded {candidate.name} instead") if notes else ()
            return _read(candidate, device, names, notes=passed_over)
        except CheckpointError as error:
            notes.append(f"passed over {candidate.name}: {error}")
    raise CheckpointError(f"no checkpoint of {run_or_checkpoint} can be loaded: {'; '.join(notes) or 'it has none'}")


def exists(run: Path) -> bool:
    """Whether the run ever finished a save, sound or not."""
    folder = run / FOLDER
    return folder.is_dir() and ((folder / LATEST).exists() or bool(newest_first(folder)))


def verify(checkpoint: Path, names: Collection[str] | None = None) -> Manifest:
    """Check every size and hash of a checkpoint folder (the hashes of the parts `names` only) without loading it.

    Raises: CheckpointError naming the file that is missing, extra or changed.
    """
    manifest = read_manifest(checkpoint)
    require_step(checkpoint, manifest)
    unknown = sorted(set(names or ()) - set(manifest.part_names))
    if unknown:
        raise CheckpointError(f"{checkpoint} has no part {unknown[0]!r}; it has: {', '.join(manifest.part_names)}")
    check_files(checkpoint, manifest, manifest.files_of(names))
    return manifest


def require_step(checkpoint: Path, manifest: Manifest) -> None:
    """Raises: CheckpointError if the folder is called by another step than it holds."""
    if step_of(checkpoint) not in (None, manifest.step):
        raise CheckpointError(f"{checkpoint} holds step {manifest.step}: the folder was renamed")


def _check_contents(files: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    check_names(files)
    check_meta(meta)
    for name, tensors in files.items():
        check_tensors(name, tensors)


def _write(staged: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    staged.mkdir()
    entries = {name: write_tensors(staged / (name + SUFFIX), tensors) for name, tensors in files.items()}
    write_file(staged / MANIFEST, [encode(Manifest(step=step, files=entries, meta=meta))])
    sync_folder(staged)


def _read(
    checkpoint: Path, device: torch.device | str, names: Collection[str] | None, notes: tuple[str, ...]
) -> Checkpoint:
    manifest = verify(checkpoint, names)
    if manifest.parts:
        files = read_pieces(checkpoint, manifest, whole_of, device, names)
    else:
        files = {
            name: read_tensors(checkpoint / (name + SUFFIX), manifest.files[name].aliases, device)
            for name in manifest.files_of(names)
        }
    return Checkpoint(path=checkpoint, step=manifest.step, files=files, meta=dict(manifest.meta), notes=notes)


def candidates(folder: Path, notes: list[str]) -> list[Path]:
    """Checkpoints in the order to try: the latest, then older ones, then newer ones (an abandoned future).

    Raises: CheckpointError if there is no such folder; `notes` gets what is wrong with `latest`.
    """
    try:
        paths = newest_first(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder.parent} is neither a run nor a checkpoint: it has no {folder.name}/ and no {MANIFEST}"
        ) from error
    try:
        latest = read_latest(folder)
    except CheckpointError as error:
        notes.append(str(error))
        return paths
    last = step_of(latest) or 0
    older = [path for path in paths if path != latest and (step_of(path) or 0) <= last]
    newer = [path for path in paths if (step_of(path) or 0) > last]
    return [latest, *older, *newer]
