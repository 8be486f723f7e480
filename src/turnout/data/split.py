"""Train text and validation text: told apart by document name, so that more text moves no document across."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from turnout.data.corpora import Document


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a corpus is divided."""

    by: Literal["document", "tail"]
    fraction: float  # share that goes to validation

    def divide(self, document: Document) -> tuple[str, str]:
        """(train text, validation text) of a document; a side that gets nothing is ""."""
        if self.by == "tail":
            return cut_tail(document.text, self.fraction)
        return ("", document.text) if in_validation(document.name, self.fraction) else (document.text, "")


def choose_split(documents: int, validation_documents: int, fraction: float) -> Split:
    """By document where there are enough of them; else the tail of each, so that neither side is empty or lopsided.

    Six novels have no fair fiftieth: one of them would be a sixth of the text, and none would be nothing.
    """
    enough = documents * fraction >= 1 and 0 < validation_documents < documents
    return Split(by="document" if enough else "tail", fraction=fraction)


def in_validation(name: str, fraction: float) -> bool:
    """Whether the document of that name is a validation document; depends on nothing but the two arguments."""
    drawn = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return drawn < fraction * 2**64


def cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """(head, tail) of one document: the tail is `fraction` of the characters, or up to twice that, to begin at
    the start of a line or a word.
    """
    cut = round(len(text) * (1 - fraction))
    earliest = max(0, cut - round(len(text) * fraction))
    for mark in ("\n", " "):
        end = text.rfind(mark, earliest, cut)
        if end != -1:
            return text[: end + 1], text[end + 1 :]
    return text[:cut], text[cut:]
