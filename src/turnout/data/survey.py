"""A look through a corpus: how many documents, how much text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from turnout.data.corpora import Corpus, Document
from turnout.errors import DataError


@dataclass(frozen=True, kw_only=True)
class CorpusCard:
    """What a corpus turned out to hold."""

    name: str
    title: str
    licence: str
    path: str  # where its text lies
    documents: int  # that hold text
    left_out: int  # documents that are empty or blank, or not UTF-8 and skipped
    text_bytes: int  # as UTF-8
    fingerprint: str


def survey(corpus: Corpus, cache: Path, visit: Callable[[Document], None] | None = None) -> CorpusCard:
    """Go through the whole corpus once, fetching it if need be; `visit` sees each document that holds text.

    Raises: DataError if it cannot be had or read, or holds no text at all.
    """
    fingerprint = corpus.fingerprint(cache)
    documents = left_out = text_bytes = 0
    for document in corpus.documents(cache):
        if is_blank(document):
            left_out += 1
            continue
        documents += 1
        text_bytes += len(document.text.encode())
        if visit is not None:
            visit(document)
    if not documents:
        raise DataError(
            f"corpus {corpus.name!r} at {corpus.location(cache)} is empty: {left_out} documents, none with text"
        )
    return CorpusCard(
        name=corpus.name,
        title=corpus.title,
        licence=corpus.licence,
        path=str(corpus.location(cache)),
        documents=documents,
        left_out=left_out,
        text_bytes=text_bytes,
        fingerprint=fingerprint,
    )


def is_blank(document: Document) -> bool:
    """Whether there is nothing in it to learn from."""
    return not document.text or document.text.isspace()
