"""Disk changes that survive a kill or a power cut: bytes reach the device before the name that shows them."""

import errno
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents, durably.

    Raises: OSError.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder (new files, renames) to the device.

    Raises: OSError.
    """
    if os.name == "nt":  # Windows cannot open a folder, and needs no flush of one
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _located(error, path) from error
    finally:
        os.close(descriptor)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a new file, flush it to the device and return its size in bytes.

    Raises: OSError naming the path, also when fewer bytes arrived than were written or the file exists.
    """
    size_bytes = 0
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                size_bytes += memoryview(chunk).nbytes
            file.flush()
            os.fsync(file.fileno())
            arrived_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _located(error, path) from error
    if arrived_bytes != size_bytes:
        raise OSError(errno.EIO, f"short write: {arrived_bytes} of {size_bytes} bytes arrived", str(path))
    return size_bytes


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file in one step: a reader sees the old text or the new, never a part.

    Raises: OSError; the old file is then still in place, unless only the last flush failed.
    """
    staged = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    staged.unlink(missing_ok=True)
    try:
        write_file(staged, [text.encode()])
        os.replace(staged, path)
    except OSError:
        with suppress(OSError):
            staged.unlink()
        raise
    sync_folder(path.parent)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder beside itself, durably.

    Raises: OSError, also when `target` is a folder with something in it.
    """
    os.rename(source, target)
    sync_folder(target.parent)


def discard_folder(path: Path) -> None:
    """Delete a folder; its name goes first, so that half of it is never taken for the whole.

    Raises: OSError; what is left is then hidden, under a name that starts with `.gone-`.
    """
    gone = path.with_name(f".gone-{path.name.lstrip('.')}-{os.getpid()}")
    move_folder(path, gone)
    shutil.rmtree(gone)


def _located(error: OSError, path: Path) -> OSError:
    """The same error with a path: a failed write() or fsync() does not know its file."""
    return OSError(error.errno, error.strerror or str(error), error.filename or str(path))
