"""Files on disk -> documents: what several corpora do with a folder of text."""

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from turnout.data.corpora.contract import Document
from turnout.data.utf8 import InvalidUtf8, decode_utf8
from turnout.errors import DataError


def file_documents(files: Iterable[Path], root: Path, invalid: InvalidUtf8 = "error") -> Iterator[Document]:
    """One document a file, sorted and named by its path under `root`; `.gz` is unpacked.

    Raises: DataError for a file that cannot be read, or is not UTF-8 and `invalid` is "error".
    """
    for name, file in named_under(files, root):
        try:
            raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read {file}: {error}") from error
        yield Document(name=name, text=decode_utf8(raw, str(file), invalid))


def fingerprint_files(files: Iterable[Path], root: Path) -> str:
    """Digest over names, sizes and times of change: a look at the folder, not a reading of it."""
    digest = hashlib.sha256()
    for name, file in named_under(files, root):
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def named_under(files: Iterable[Path], root: Path) -> list[tuple[str, Path]]:
    """(path below `root` with forward slashes, file), in an order that no file system or locale decides."""
    return sorted((file.relative_to(root).as_posix(), file) for file in files)
