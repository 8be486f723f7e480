"""The manifest of a checkpoint: written last, it says what a whole checkpoint is, and covers itself by a hash."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turnout.errors import CheckpointError
from turnout.train.checkpoint_tensors import FileEntry, hash_file

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
FORMAT = "turnout-checkpoint"
VERSION, SHARDED = 1, 2  # of the manifest: with whole tensors in a file for each part, or with pieces in many
_MAX_BYTES = 64 * 2**20  # read at once, so bounded
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # no separator, no leading dot: no way out of the folder


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """What the manifest says of a part whose tensors lie in pieces in the files of many ranks."""

    files: tuple[str, ...]  # names without .safetensors
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype in safetensors' word, shape of the whole


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a whole checkpoint is."""

    step: int
    files: Mapping[str, FileEntry]  # name without .safetensors
    meta: Mapping[str, Any]  # JSON
    parts: Mapping[str, PartEntry] = field(default_factory=dict)  # empty: every file is a part, of whole tensors

    @property
    def part_names(self) -> tuple[str, ...]:
        """Its parts, such as model."""
        return tuple(self.parts or self.files)

    def files_of(self, names: Collection[str] | None) -> tuple[str, ...]:
        """The files of these parts; of all, when None."""
        if not self.parts or names is None:
            return tuple(name for name in self.files if names is None or name in names)
        return tuple(file for name, part in self.parts.items() if name in names for file in part.files)


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
    body = asdict(manifest)
    if not manifest.parts:
        del body["parts"]
    return _sealed({"format": FORMAT, "version": SHARDED if manifest.parts else VERSION} | body)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint folder, whole and unchanged.

    Raises: CheckpointError if it is missing, of another format or version, or differs in any bit from what
    was written.
    """
    path = checkpoint / MANIFEST
    data, raw = _parsed(path)
    if data.get("format") != FORMAT or data.get("version") not in (VERSION, SHARDED):
        raise CheckpointError(
            f"{path} has format {data.get('format')!r} version {data.get('version')!r}; this Turnout reads "
            f"{FORMAT!r} version {VERSION} and {SHARDED}. Use the Turnout that wrote it, or another checkpoint"
        )
    data.pop("blake2b", None)
    try:
        intact = _sealed(data) == raw
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its own hash")
    return _manifest(data, path)


def check_files(checkpoint: Path, manifest: Manifest, hashed: Collection[str]) -> None:
    """Compare the folder with its manifest: the set of files, every size, and the hashes of the files `hashed`.

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
            _check_size(checkpoint / (name + SUFFIX), entry)
    except OSError as error:
        raise CheckpointError(f"cannot read {checkpoint}: {error}") from error
    check_hashes(checkpoint, manifest, hashed)


def check_hashes(checkpoint: Path, manifest: Manifest, files: Collection[str]) -> None:
    """Raises: CheckpointError naming the first of these files that changed in any bit."""
    for name in files:
        path = checkpoint / (name + SUFFIX)
        try:
            digest = hash_file(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {checkpoint}: {error}") from error
        if digest != manifest.files[name].blake2b:
            raise CheckpointError(f"{path} is damaged: its content does not match the hash in its manifest")


def _check_size(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is not a plain file")
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise CheckpointError(f"{path} is damaged: {size_bytes} bytes, its manifest says {entry.size_bytes}")


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
    entries = {name: _entry(files[name], name, path) for name in files}
    parts = _parts(data.get("parts"), entries, path) if data["version"] == SHARDED else {}
    return Manifest(step=step, files=entries, meta=meta, parts=parts)


def _parts(data: Any, files: Collection[str], path: Path) -> dict[str, PartEntry]:
    try:
        parts = {
            name: PartEntry(
                files=tuple(str(file) for file in part["files"]),
                tensors={
                    str(tensor): (str(dtype), tuple(int(size) for size in shape))
                    for tensor, (dtype, shape) in part["tensors"].items()
                },
            )
            for name, part in data.items()
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say what its parts are ({error!r})") from error
    check_names(parts)
    owned = [file for part in parts.values() for file in part.files]
    if sorted(owned) != sorted(files):
        raise CheckpointError(f"{path}: its parts do not have each of its files once")
    return parts


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
