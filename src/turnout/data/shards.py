"""Token shards: a flat file of token ids, and a JSON index that says what they are.

NAME.bin   little-endian uint16 (uint32 for vocabularies past 65,536): each document's tokens, then end of text
NAME.json  counts, dtype, where each document starts, and the digests of the file, the tokenizer and the corpus

The index is written last, so a shard without one is a shard that was cut short.
"""

import hashlib
import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from turnout.config import from_dict
from turnout.data.atomic import atomic_file, write_atomic
from turnout.errors import ConfigError, DataError

FORMAT = "turnout-tokens-1"
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a shard is. In the file, `document_starts` stands beside these: one more than there are documents."""

    format: str
    dtype: str  # uint16 or uint32
    num_tokens: int  # end-of-text tokens included
    vocab_size: int  # of the tokenizer
    eot_id: int  # token that ends each document
    tokenizer: str  # fingerprint
    corpus: str  # fingerprint
    sha256: str  # of the .bin file


class TokenShard:
    """Memory-mapped tokens of many documents, read-only."""

    def __init__(
        self, index: ShardIndex, document_starts: NDArray[np.int64], tokens: NDArray[np.unsignedinteger[Any]]
    ) -> None:
        self.index = index
        self.document_starts = document_starts  # the last is num_tokens
        self.tokens = tokens

    @classmethod
    def open(cls, path: Path, *, tokenizer: str | None = None) -> "TokenShard":
        """The shard whose tokens are in `path` (NAME.bin); `tokenizer` is the fingerprint it must have been made with.

        Raises: DataError if a file is missing, was cut short or changed, or belongs to another tokenizer.
        """
        index, document_starts = _read_index(path)
        if tokenizer is not None and index.tokenizer != tokenizer:
            raise DataError(
                f"{path} was made with tokenizer {index.tokenizer[:12]}, not {tokenizer[:12]}: "
                f"its ids mean other text; {_remedy(path)}"
            )
        _check_content(path, index)
        return cls(index, document_starts, np.memmap(path, dtype=_DTYPES[index.dtype], mode="r"))

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens themselves, the same on every machine."""
        return self.index.sha256

    @property
    def num_tokens(self) -> int:
        return self.index.num_tokens

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    def document(self, number: int) -> NDArray[np.unsignedinteger[Any]]:
        """The tokens of one document, without the end of text."""
        return self.tokens[self.document_starts[number] : self.document_starts[number + 1] - 1]

    def token_counts(self, most: int = 1 << 24) -> NDArray[np.int64]:
        """How often each id of the vocabulary stands in the first `most` tokens."""
        return np.bincount(self.tokens[:most], minlength=self.index.vocab_size).astype(np.int64)


class ShardWriter:
    """Takes the documents of one shard, in order; `write_shard` makes it."""

    def __init__(self, file: BinaryIO, dtype: str, eot_id: int) -> None:
        self._file = file
        self._dtype = _DTYPES[dtype]
        self._eot = np.array([eot_id], dtype=self._dtype).tobytes()
        self.digest = hashlib.sha256()
        self.document_starts = [0]

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    def append(self, tokens: Sequence[int]) -> None:
        """Add one document; its end of text is added here."""
        content = np.asarray(tokens, dtype=self._dtype).tobytes() + self._eot
        self.digest.update(content)
        self._file.write(content)
        self.document_starts.append(self.document_starts[-1] + len(tokens) + 1)


@contextmanager
def write_shard(path: Path, *, vocab_size: int, eot_id: int, tokenizer: str, corpus: str) -> Generator[ShardWriter]:
    """Write NAME.bin (`path`) and then NAME.json; an error in the `with` block leaves neither.

    Raises: DataError if no document was appended.
    """
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    with atomic_file(path) as file:
        writer = ShardWriter(file, dtype, eot_id)
        yield writer
        if not writer.num_documents:
            raise DataError(f"no documents to write to {path}")
    index = ShardIndex(
        format=FORMAT,
        dtype=dtype,
        num_tokens=writer.document_starts[-1],
        vocab_size=vocab_size,
        eot_id=eot_id,
        tokenizer=tokenizer,
        corpus=corpus,
        sha256=writer.digest.hexdigest(),
    )
    content = asdict(index) | {"document_starts": writer.document_starts}
    write_atomic(path.with_suffix(".json"), json.dumps(content).encode())


def _read_index(path: Path) -> tuple[ShardIndex, NDArray[np.int64]]:
    file = path.with_suffix(".json")
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"token shard {path} has no index {file.name}, so it is not whole; {_remedy(path)}") from error
    except ValueError as error:
        raise DataError(f"{file} is not a shard index ({error}); {_remedy(path)}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{file} has format {found!r}; this version reads {FORMAT!r}; {_remedy(path)}")
    try:
        starts = np.asarray(data.pop("document_starts", []), dtype=np.int64)
        index = from_dict(ShardIndex, data)
        _check_index(index, starts)
    except (ConfigError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file} is damaged ({error}); {_remedy(path)}") from error
    return index, starts


def _check_index(index: ShardIndex, starts: NDArray[np.int64]) -> None:
    if index.dtype not in _DTYPES:
        raise ValueError(f"dtype {index.dtype!r}; it must be one of: {', '.join(_DTYPES)}")
    if starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or starts[-1] != index.num_tokens:
        raise ValueError(f"document_starts must run from 0 to num_tokens={index.num_tokens}")
    if np.diff(starts).min() < 1:
        raise ValueError("document_starts must rise")


def _check_content(path: Path, index: ShardIndex) -> None:
    want_bytes = index.num_tokens * _DTYPES[index.dtype].itemsize
    try:
        with path.open("rb") as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes != want_bytes:
                raise DataError(f"{path} has {found_bytes} bytes; its index says {want_bytes}; {_remedy(path)}")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read token shard {path}: {error}; {_remedy(path)}") from error
    if digest != index.sha256:
        raise DataError(f"{path} was changed or damaged: its sha256 is not the one in its index; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"delete the folder {path.parent} and prepare again"
