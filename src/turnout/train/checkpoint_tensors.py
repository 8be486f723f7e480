"""One safetensors file: written in one pass that also hashes it, read back after it was verified.

Written here and not by `safetensors.torch.save_file`, which renames a temporary file of its own with mode 0600,
hides errno, and leaves the hash to a second reading of bytes that may already be wrong.
Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from turnout.errors import CheckpointError
from turnout.train.durable import write_file

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class FlatState:
    """The state of one object as tensors for a checkpoint file and JSON for the checkpoint's `meta`."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What the manifest says of one file."""

    size_bytes: int
    blake2b: str  # hex digest of the whole file
    aliases: Mapping[str, str]  # name -> name of the stored tensor that is the very same memory


def dtype_name(dtype: torch.dtype) -> str:
    """How safetensors calls it."""
    return _DTYPE_NAMES[dtype]


def dtype_called(name: str) -> torch.dtype | None:
    """The dtype that safetensors calls so; None if there is none."""
    return next((dtype for dtype, word in _DTYPE_NAMES.items() if word == name), None)


def check_tensors(file: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse, before any byte is written, what a checkpoint could not give back exactly.

    Raises: CheckpointError for what is no plain dense tensor with data (a DTensor would store one rank's part
    only), or has a dtype safetensors cannot hold.
    """
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise CheckpointError(
                f"{file}/{name} is a {type(tensor).__name__}; a checkpoint holds plain tensors: "
                "gather a DTensor with .full_tensor(), put anything else in `meta`"
            )
        lazy = tensor.is_meta or tensor.is_conj() or tensor.is_neg()
        if tensor.layout != torch.strided or lazy or name == "__metadata__":
            raise CheckpointError(
                f"{file}/{name} ({tensor.layout}, {tensor.device}) cannot be stored; needs a dense tensor with "
                "data (no pending conj or neg), under another name than __metadata__"
            )
        if tensor.dtype not in _DTYPE_NAMES:
            legal = ", ".join(_DTYPE_NAMES.values())
            raise CheckpointError(f"{file}/{name} has dtype {tensor.dtype}; safetensors holds {legal}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write one file durably and return its manifest entry.

    Tensors that are the very same memory (tied weights) are stored once and listed as aliases; tensors that
    only overlap are stored apart, each in full.
    Raises: OSError.
    """
    stored, aliases = _without_aliases(tensors)
    return _written(path, stored, aliases)


def write_pieces(path: Path, pieces: Mapping[str, Tensor]) -> FileEntry:
    """The same for tensors each of which is stored as it is called.

    Raises: OSError.
    """
    return _written(path, pieces, {})


def _written(path: Path, stored: Mapping[str, Tensor], aliases: Mapping[str, str]) -> FileEntry:
    digest = hashlib.blake2b(digest_size=32)

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in _chunks(stored):
            digest.update(chunk)
            yield chunk

    size_bytes = write_file(path, hashed())
    return FileEntry(size_bytes=size_bytes, blake2b=digest.hexdigest(), aliases=aliases)


def hash_file(path: Path) -> str:
    """Hex digest of a file, read as a stream.

    Raises: OSError.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def read_tensors(path: Path, aliases: Mapping[str, str], device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a verified file, in memory of their own; an alias is the same tensor object again.

    Raises: CheckpointError if the file is not well-formed safetensors, or an alias names no stored tensor.
    """
    try:
        mapped = load_file(path, device=str(device))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a well-formed safetensors file: {error}") from error
    # load_file maps the file: without a copy, a later change of the file would change the tensors.
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    for alias, name in aliases.items():
        if alias in tensors or name not in mapped:
            raise CheckpointError(f"{path}: alias {alias!r} of {name!r} does not fit the stored tensors")
        tensors[alias] = tensors[name]
    return tensors


def _without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            stored[name] = tensor
    return stored, aliases


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    # Widest elements first: every tensor then starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    yield _header({name: tensors[name] for name in order})
    for name in order:
        as_bytes = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield cast(memoryview, as_bytes.data)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
