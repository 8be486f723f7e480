"""The Perl manual."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.corpora.files import file_documents
from turnout.data.sources import DebianPackages, Source


@CORPORA.register("perl-doc")
@dataclass(frozen=True, kw_only=True)
class PerlDoc(FetchedCorpus):
    """Perl's tutorials, reference and release notes in POD, one document a page.

    Measured: 206 documents, 8,774,928 bytes.
    """

    title: ClassVar[str] = "Perl manual"
    licence: ClassVar[str] = "Artistic-1.0-Perl OR GPL-1.0-or-later"
    size_bytes: ClassVar[int] = 8_800_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "Debian package perl-doc, a 7.9 MB download."
    source: ClassVar[Source] = DebianPackages(packages=("perl-doc",))

    def read(self, root: Path) -> Iterator[Document]:
        pages = root / "usr/share/perl"
        return file_documents((file for file in pages.rglob("*.pod") if not file.is_symlink()), pages)
