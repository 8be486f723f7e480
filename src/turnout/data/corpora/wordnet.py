"""WordNet's glosses: short, plain English sentences that say what a word means."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.sources import DebianPackages, Source
from turnout.data.utf8 import decode_utf8

_PARTS = ("noun", "verb", "adj", "adv")


@CORPORA.register("wordnet")
@dataclass(frozen=True, kw_only=True)
class WordNet(FetchedCorpus):
    """One document a meaning: its words, a colon, and its gloss with examples.

    Measured: 117,659 documents, 11,497,904 bytes.
    """

    title: ClassVar[str] = "WordNet 3.0 glosses"
    licence: ClassVar[str] = "WordNet (permissive)"
    size_bytes: ClassVar[int] = 11_500_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "Debian package wordnet-base, a 6.5 MB download."
    source: ClassVar[Source] = DebianPackages(packages=("wordnet-base",))

    def read(self, root: Path) -> Iterator[Document]:
        for part in _PARTS:
            file = root / "usr/share/wordnet" / f"data.{part}"
            for line in decode_utf8(file.read_bytes(), str(file)).splitlines():
                # lines that begin with blanks are the licence
                if not line.startswith(" "):
                    yield _meaning(part, line)


def _meaning(part: str, line: str) -> Document:
    """Source: wndb(5WN), section Data File Format: offset, file, type, count in hex, then word and id in turn."""
    data, _, gloss = line.partition(" | ")
    offset, _, _, count, *rest = data.split()
    words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
    return Document(name=f"{part}-{offset}", text=f"{', '.join(words)}: {gloss.strip()}\n")
