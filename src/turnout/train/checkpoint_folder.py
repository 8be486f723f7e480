"""The `checkpoints/` folder of a run: which names mean what, and the order in which they change.

    step-N            a whole checkpoint
    latest            names the newest one that is durable, with a hash of the name
    .tmp-*            a save in progress, or what a dead one left
    .replaced-step-N  the old step-N while a new one takes its name; whole, so still good for loading
    .gone-*           being deleted

A run has one writer, so whatever is temporary when it starts a save was left by a dead one. Readers may come
at any time.
"""

import hashlib
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from turnout.errors import CheckpointError
from turnout.train.durable import discard_folder, move_folder, replace_text

FOLDER = "checkpoints"
LATEST = "latest"
_STEP = re.compile(r"(\.replaced-)?step-(0|[1-9][0-9]{0,17})")


def step_of(path: Path) -> int | None:
    """The N of a folder called step-N (or .replaced-step-N), else None."""
    match = _STEP.fullmatch(path.name)
    return int(match[2]) if match else None


def staging(folder: Path, step: int) -> Path:
    """Where this process writes step N until it is whole."""
    return folder / f".tmp-step-{step}-{os.getpid()}"


def read_latest(folder: Path) -> Path:
    """The checkpoint that `latest` names; it need not exist.

    Raises: CheckpointError if `latest` is missing or damaged.
    """
    path = folder / LATEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    name = raw.decode("ascii", "replace").partition("\n")[0]
    target = folder / name
    if raw != _latest_text(name).encode() or step_of(target) is None:
        raise CheckpointError(f"{path} is damaged")
    return target


def point_latest(folder: Path, target: Path) -> None:
    """Make `latest` name `target`, which must be durable.

    Raises: OSError.
    """
    replace_text(folder / LATEST, _latest_text(target.name))


def newest_first(folder: Path) -> list[Path]:
    """Every folder that may be a whole checkpoint, by falling step; a replaced one after its successor.

    Raises: OSError.
    """
    found = [(step_of(path), path) for path in folder.iterdir()]
    known = [(step, not path.name.startswith("."), path) for step, path in found if step is not None]
    return [path for _, _, path in sorted(known, reverse=True)]


def tidy(folder: Path) -> None:
    """Finish what a dead save left: restore a checkpoint whose successor never came, delete the rest.

    Raises: OSError if a checkpoint cannot be restored; what cannot be deleted stays, hidden.
    """
    for path in newest_first(folder):
        target = folder / f"step-{step_of(path)}"
        if path != target and not target.exists():
            move_folder(path, target)
        elif path != target:
            with suppress(OSError):
                discard_folder(path)
    for path in folder.iterdir():
        if path.name.startswith((".gone-", ".tmp-")):
            _delete(path)


def publish(staged: Path, target: Path) -> None:
    """Give a staged folder its name; an older checkpoint of that name stays whole under another until `prune`.

    Raises: OSError; the older one has then its name back, or gets it in the next `tidy`.
    """
    if not target.exists():
        move_folder(staged, target)
        return
    replaced = target.with_name(f".replaced-{target.name}")
    move_folder(target, replaced)
    try:
        move_folder(staged, target)
    except OSError:
        if not target.exists():
            with suppress(OSError):
                move_folder(replaced, target)
        raise


def prune(folder: Path, latest: Path, keep_last: int) -> None:
    """Delete checkpoints older than the newest `keep_last` up to `latest`, and warn about what cannot be deleted.

    Steps after `latest` are of a run that went back to an earlier checkpoint; they are the user's to delete.
    """
    try:
        tidy(folder)
        last = step_of(latest) or 0
        visible = [path for path in newest_first(folder) if not path.name.startswith(".")]
        for path in [path for path in visible if (step_of(path) or 0) <= last][keep_last:]:
            discard_folder(path)
    except OSError as error:
        warnings.warn(f"{latest.name} is saved, but an older checkpoint could not be deleted: {error}", stacklevel=3)


def _latest_text(name: str) -> str:
    return f"{name}\n{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}\n"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
