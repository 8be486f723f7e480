"""The Git manual."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.corpora.files import file_documents
from turnout.data.sources import DebianPackages, Source


@CORPORA.register("git-doc")
@dataclass(frozen=True, kw_only=True)
class GitDoc(FetchedCorpus):
    """Git's manual pages and guides in AsciiDoc, one document a page.

    Measured: 292 documents, 2,937,836 bytes.
    """

    title: ClassVar[str] = "Git manual"
    licence: ClassVar[str] = "GPL-2.0-only"
    size_bytes: ClassVar[int] = 2_900_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "Debian package git-doc, a 2.2 MB download."
    source: ClassVar[Source] = DebianPackages(packages=("git-doc",))

    def read(self, root: Path) -> Iterator[Document]:
        pages = root / "usr/share/doc/git-doc"
        return file_documents((file for file in pages.rglob("*.txt") if not file.is_symlink()), pages)
