"""The manifest of a checkpoint: written last, it says what a whole checkpoint is, and covers itself by a hash."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turnout.errors import CheckpointError
from turnout.train.checkpoint_tensors import FileEntry, hash_file

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
FORMAT = "turnout-checkpoint"
VERSION = 1
_MAX_BYTES = 64 * 2**20  # read at once, so bounded
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # no separator, no leading dot: no way out of the folder


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a whole checkpoint is."""

    step: int
    files: Mapping[str, FileEntry]  # name without .safetensors
    meta: Mapping[str, Any]  # JSON


def check_names(names: Collection[str]) -> None:
    """Refuse names that could leave the folder or hide in it.

    Raises: CheckpointError.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise CheckpointError(
                f"checkpoint file name {name!r} is refused; legal: a letter or digit, then at most 99 of "
                "letters, digits, '_', '-', '.'"
            )


def check_meta(meta: Mapping[str, Any]) -> None:
    """Refuse what JSON would not give back equal: NaN, tuples, number keys, objects.

    Raises: CheckpointError naming the entry.
    """
    for key, value in meta.items():
        try:
            same = isinstance(key, str) and json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"meta[{key!r}] is not JSON: {error}") from error
        if not same:
            raise CheckpointError(
                f"meta[{key!r}] would not come back equal from JSON; use lists for tuples, strings for keys"
            )


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json; the same manifest always gives the same bytes."""
    return _sealed({"format": FORMAT, "version": VERSION} | asdict(manifest))


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint folder, whole and unchanged.

    Raises: CheckpointError if it is missing, of another format or version, or differs in any bit from what
    was written.
    """
    path = checkpoint / MANIFEST
    data, raw = _parsed(path)
    if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} has format {data.get('format')!r} version {data.get('version')!r}; this Turnout reads "
            f"{FORMAT!r} version {VERSION}. Use the Turnout that wrote it, or another checkpoint"
        )
    data.pop("blake2b", None)
    try:
        intact = _sealed(data) == raw
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its own hash")
    return _manifest(data, path)


def check_files(checkpoint: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Compare the folder with its manifest: the set of files, every size, and the hashes (of `names` only).

    Raises: CheckpointError naming the first file that is missing, extra, no plain file, or changed.
    """
    expected = {name + SUFFIX for name in manifest.files} | {MANIFEST}
    try:
        found = {entry.name for entry in checkpoint.iterdir()}
        if found != expected:
            raise CheckpointError(
                f"{checkpoint} is not what its manifest lists: missing {_listed(expected - found)}, "
                f"unexpected {_listed(found - expected)}"
            )
        for name, entry in manifest.files.items():
            _check_file(checkpoint / (name + SUFFIX), entry, hashed=names is None or name in names)
    except OSError as error:
        raise CheckpointError(f"cannot read {checkpoint}: {error}") from error


def _check_file(path: Path, entry: FileEntry, *, hashed: bool) -> None:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is not a plain file")
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise CheckpointError(f"{path} is damaged: {size_bytes} bytes, its manifest says {entry.size_bytes}")
    if hashed and hash_file(path) != entry.blake2b:
        raise CheckpointError(f"{path} is damaged: its content does not match the hash in its manifest")


def _sealed(body: Mapping[str, Any]) -> bytes:
    digest = hashlib.blake2b(_json(body), digest_size=32).hexdigest()
    return _json({**body, "blake2b": digest})


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _parsed(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is damaged: not a plain file of at most {_MAX_BYTES} bytes")
        raw = path.read_bytes()
        data = json.loads(raw)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {MANIFEST}: it is not a finished checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object")
    return data, raw


def _manifest(data: dict[str, Any], path: Path) -> Manifest:
    """Typed fields of a manifest that was sealed, though perhaps not by us."""
    step, files, meta = data.get("step"), data.get("files"), data.get("meta")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not isinstance(meta, dict):
        raise CheckpointError(f"{path} lacks a step, its files or its meta")
    check_names(files)
    return Manifest(step=step, files={name: _entry(files[name], name, path) for name in files}, meta=meta)


def _entry(data: Any, name: str, path: Path) -> FileEntry:
    fields = data if isinstance(data, dict) else {}
    size_bytes, blake2b, aliases = (fields.get(key) for key in ("size_bytes", "blake2b", "aliases"))
    if type(size_bytes) is not int or not isinstance(blake2b, str) or not isinstance(aliases, dict):
        raise CheckpointError(f"{path}: the entry of {name!r} lacks its size, hash or aliases")
    if not all(isinstance(kept, str) for kept in aliases.values()):
        raise CheckpointError(f"{path}: the entry of {name!r} has an alias that is not a name")
    return FileEntry(size_bytes=size_bytes, blake2b=blake2b, aliases=aliases)


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)
    return (", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")) or "none"
