"""What Debian says about each of its packages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.sources import DebianDescriptions, Source
from turnout.data.utf8 import decode_utf8

_ENTRY = re.compile(r"^Description-md5: (\w+)\nDescription-en: (.*\n(?: .*\n)*)", re.MULTILINE)
# a line with only a dot is an empty line
_BLANK = re.compile(r"^ \.$", re.MULTILINE)


@CORPORA.register("debian-descriptions")
@dataclass(frozen=True, kw_only=True)
class DebianPackageDescriptions(FetchedCorpus):
    """One document a package: its one-line summary, then paragraphs of clean technical prose.

    Measured: 61,774 documents, 25,582,899 bytes.
    """

    title: ClassVar[str] = "Debian package descriptions"
    licence: ClassVar[str] = "free; each that of its package"
    size_bytes: ClassVar[int] = 25_600_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "English package lists of the machine's Debian release, a 30 MB download."
    source: ClassVar[Source] = DebianDescriptions(language="en")

    def read(self, root: Path) -> Iterator[Document]:
        seen: set[str] = set()
        for file in sorted((root / "lists").glob("*_Translation-en")):
            for digest, text in _ENTRY.findall(decode_utf8(file.read_bytes(), file.name)):
                # updates repeat what the release says
                if digest not in seen:
                    seen.add(digest)
                    yield Document(name=digest, text=_BLANK.sub("", text).replace("\n ", "\n"))
