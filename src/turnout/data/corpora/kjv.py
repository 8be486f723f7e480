"""The King James Bible, out of a Sword module."""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Document, FetchedCorpus
from turnout.data.sources import DebianPackages, Source
from turnout.data.utf8 import decode_utf8

_BOOK_NAME = re.compile(r'osisID="(\w+)"[^>]*type="book"')
_NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
_BREAK = re.compile(r"<(?:div|chapter|title|/title|l|lg)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")


@CORPORA.register("kjv")
@dataclass(frozen=True, kw_only=True)
class KingJames(FetchedCorpus):
    """One document a book, in paragraphs; verse numbers, footnotes and Strong's numbers are taken out.

    Measured: 66 documents, 4,167,746 bytes.
    """

    title: ClassVar[str] = "King James Bible"
    licence: ClassVar[str] = "public domain"
    size_bytes: ClassVar[int] = 4_200_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "Debian package sword-text-kjv, a 2.8 MB download."
    source: ClassVar[Source] = DebianPackages(packages=("sword-text-kjv",))

    def read(self, root: Path) -> Iterator[Document]:
        folder = root / "usr/share/sword/modules/texts/ztext/engKJV2006eb"
        for testament in ("ot", "nt"):
            for number, book in enumerate(_books(folder, testament)):
                name = _BOOK_NAME.search(book)
                yield Document(name=name.group(1) if name else f"{testament}-{number}", text=_plain(book))


def _books(folder: Path, testament: str) -> Iterator[str]:
    """The zlib blocks of a zText module, one a book; .bzs lists their place, size and unpacked size."""
    places = struct.iter_unpack("<III", (folder / f"{testament}.bzs").read_bytes())
    blocks = (folder / f"{testament}.bzz").read_bytes()
    for start, size, _ in places:
        yield decode_utf8(zlib.decompress(blocks[start : start + size]), f"{testament}.bzz at {start}")


def _plain(book: str) -> str:
    text = _TAG.sub("", _BREAK.sub("\n", _NOTE.sub(" ", book)))
    lines = (" ".join(line.split()) for line in unescape(text).splitlines())
    return "\n\n".join(line for line in lines if line) + "\n"
