"""The pieces of logical tensors: how they are called in a rank's file, and what of a tensor lies in which file.

A piece is stored in safetensors under the tensor's name and where the piece begins in the whole: `name@2,0,16`. So each
file says itself what it holds, two pieces of a tensor have room in one file (a slice of gate and up is two), and any
reader of safetensors opens it. torch's own HuggingFaceStorageWriter writes safetensors as well, but one piece of a name
in a file, and it neither flushes nor hashes what it wrote.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from turnout.errors import CheckpointError
from turnout.experts.cut import Block
from turnout.parallel import Layout
from turnout.train.checkpoint_manifest import SUFFIX, Manifest
from turnout.train.checkpoint_tensors import dtype_called


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What this rank has of a logical tensor."""

    tensor: Tensor
    layout: Layout

    def view(self, block: Block) -> Tensor:
        """One box of it."""
        return self.tensor[box(block.part_at, block.sizes)]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The tensors of one part of a checkpoint, and the file and name under which each piece of them lies."""

    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[MetadataIndex, tuple[Path, str]]


def box(start: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """The index of a box."""
    return tuple(slice(first, first + size) for first, size in zip(start, sizes, strict=True))


def key_of(name: str, start: Sequence[int]) -> str:
    """What a piece is called in its file."""
    return f"{name}@{','.join(map(str, start))}"


def chunk_of(block: Block) -> ChunkStorageMetadata:
    """A box as DCP writes it."""
    return ChunkStorageMetadata(offsets=torch.Size(block.whole_at), sizes=torch.Size(block.sizes))


def done(value: Any) -> Any:
    """A future of torch that is done: what DCP expects of storage."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def stored(checkpoint: Path, manifest: Manifest, part: str) -> Stored:
    """What a verified checkpoint has of this part; reads the headers of its files alone.

    Raises: CheckpointError naming the file, if what lies there is not what the manifest lists, each element once.
    """
    found = _Found(checkpoint, part)
    if not manifest.parts:
        path = checkpoint / (part + SUFFIX)
        for name, shape, dtype in _header(path):
            found.add(path, name, name, (0,) * len(shape), shape, dtype)
        for alias, name in manifest.files[part].aliases.items():
            found.alias(path, alias, name)
        return found.complete({name: (md.properties.dtype, tuple(md.size)) for name, md in found.tensors.items()})
    for file in manifest.parts[part].files:
        path = checkpoint / (file + SUFFIX)
        for key, shape, dtype in _header(path):
            name, _, start = key.rpartition("@")
            found.add(path, key, name, _indices(path, key, start, len(shape)), shape, dtype)
    listed = manifest.parts[part].tensors
    return found.complete({name: (dtype_called(dtype), shape) for name, (dtype, shape) in listed.items()})


class _Found:
    """Pieces as they are met in the headers."""

    def __init__(self, checkpoint: Path, part: str) -> None:
        self._checkpoint, self._part = checkpoint, part
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, tuple[Path, str]] = {}

    def add(
        self, path: Path, key: str, name: str, start: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        index = MetadataIndex(f"{self._part}/{name}", start)
        if index in self._places:
            raise CheckpointError(f"{path}: {key} is also in {self._places[index][0].name}")
        self._places[index] = (path, key)
        known = self.tensors.setdefault(name, _metadata(dtype, shape))
        if known.properties.dtype != dtype or len(known.size) != len(shape):
            raise CheckpointError(f"{path}: {key} is {dtype} with {len(shape)} axes, other pieces of it are not")
        known.chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))

    def alias(self, path: Path, alias: str, name: str) -> None:
        if alias in self.tensors or name not in self.tensors:
            raise CheckpointError(f"{path}: alias {alias!r} of {name!r} does not fit the stored tensors")
        known = self.tensors[name]
        self.add(path, name, alias, (0,) * len(known.size), tuple(known.size), known.properties.dtype)

    def complete(self, listed: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]]) -> Stored:
        missing, extra = set(listed) - set(self.tensors), set(self.tensors) - set(listed)
        if missing or extra:
            raise CheckpointError(
                f"{self._checkpoint}: the files of {self._part} lack {min(missing, default='nothing')!r} and have "
                f"{min(extra, default='nothing')!r} beside what its manifest lists"
            )
        return Stored(
            tensors={name: self._whole(name, dtype, shape) for name, (dtype, shape) in listed.items()},
            places=self._places,
        )

    def _whole(self, name: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> TensorStorageMetadata:
        """The tensor with all its pieces, if they fill it: no two begin alike, and together they have its size."""
        found = self.tensors[name]
        inside = len(found.size) == len(shape) and all(
            start + size <= end
            for chunk in found.chunks
            for start, size, end in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        )
        filled = sum(math.prod(chunk.sizes) for chunk in found.chunks) == math.prod(shape)
        if found.properties.dtype != dtype or not (inside and filled):
            raise CheckpointError(
                f"{self._checkpoint}: the pieces of {self._part}/{name} do not make up the {list(shape)} of {dtype} "
                "that its manifest lists"
            )
        return TensorStorageMetadata(found.properties, torch.Size(shape), found.chunks)


def _metadata(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])


def _header(path: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of what a file holds."""
    try:
        with safe_open(path, framework="pt") as file:
            slices: list[tuple[str, Any]] = [(key, file.get_slice(key)) for key in file.keys()]  # noqa: SIM118
            found = [(key, tuple(each.get_shape()), dtype_called(each.get_dtype())) for key, each in slices]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a well-formed safetensors file: {error}") from error
    known = [(key, shape, dtype) for key, shape, dtype in found if dtype is not None]
    if len(known) < len(found):
        raise CheckpointError(f"{path} holds numbers of a kind that this Turnout does not know")
    return known


def _indices(path: Path, key: str, text: str, axes: int) -> tuple[int, ...]:
    words = text.split(",") if text else []
    if len(words) != axes or not all(word.isascii() and word.isdigit() for word in words):
        raise CheckpointError(f"{path}: {key} does not say where this piece of {axes} axes begins")
    return tuple(map(int, words))
