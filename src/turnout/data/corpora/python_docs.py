"""The Python manual."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.corpora.files import file_documents
from turnout.data.sources import DebianPackages, Source


@CORPORA.register("python-docs")
@dataclass(frozen=True, kw_only=True)
class PythonDocs(FetchedCorpus):
    """The manual of Python 3.11 as its authors typed it, one document a page of reStructuredText.

    Measured: 497 documents, 11,048,275 bytes; 3.1 M tokens of a vocabulary of 4,096.
    """

    title: ClassVar[str] = "Python 3.11 manual"
    licence: ClassVar[str] = "PSF-2.0"
    size_bytes: ClassVar[int] = 11_000_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "Debian package python3.11-doc, a 12.6 MB download."
    source: ClassVar[Source] = DebianPackages(packages=("python3.11-doc",))

    def read(self, root: Path) -> Iterator[Document]:
        pages = root / "usr/share/doc/python3.11/html/_sources"
        return file_documents(pages.rglob("*.txt"), pages)
