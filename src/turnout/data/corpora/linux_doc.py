"""The documentation of the Linux kernel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.corpora.files import file_documents
from turnout.data.sources import DebianPackages, Source


@CORPORA.register("linux-doc")
@dataclass(frozen=True, kw_only=True)
class LinuxDoc(FetchedCorpus):
    """The kernel's Documentation folder, one document a page of reStructuredText; translations are left out.

    Measured: 2,841 documents, 21,372,070 bytes.
    """

    title: ClassVar[str] = "Linux 6.1 kernel documentation"
    licence: ClassVar[str] = "GPL-2.0-only"
    size_bytes: ClassVar[int] = 21_400_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "Debian package linux-doc-6.1, a 37 MB download (230 MB of disk while it unpacks)."
    source: ClassVar[Source] = DebianPackages(packages=("linux-doc-6.1",))

    def read(self, root: Path) -> Iterator[Document]:
        pages = root / "usr/share/doc/linux-doc-6.1/Documentation"
        found = [file for pattern in ("*.rst", "*.rst.gz") for file in pages.rglob(pattern)]
        english = (file for file in found if "translations" not in file.relative_to(pages).parts)
        return file_documents((file for file in english if not file.is_symlink()), pages)
