"""Corpora, one a file and one row each. `open_corpus("sotu")` or `open_corpus("notes/")` gives the documents."""

import glob
from pathlib import Path

from turnout.cache import path_of
from turnout.data.corpora.austen import Austen
from turnout.data.corpora.contract import CORPORA, Corpus, Document, FetchedCorpus
from turnout.data.corpora.debian_descriptions import DebianPackageDescriptions
from turnout.data.corpora.gcide import Gcide
from turnout.data.corpora.git_doc import GitDoc
from turnout.data.corpora.kjv import KingJames
from turnout.data.corpora.linux_doc import LinuxDoc
from turnout.data.corpora.moby_dick import MobyDick
from turnout.data.corpora.perl_doc import PerlDoc
from turnout.data.corpora.python_docs import PythonDocs
from turnout.data.corpora.sotu import StateOfTheUnion
from turnout.data.corpora.stdlib import Stdlib
from turnout.data.corpora.text import Text
from turnout.data.corpora.wordnet import WordNet
from turnout.data.utf8 import InvalidUtf8
from turnout.errors import ConfigError
from turnout.registry import nearest

__all__ = [
    "CORPORA",
    "Austen",
    "Corpus",
    "DebianPackageDescriptions",
    "Document",
    "FetchedCorpus",
    "Gcide",
    "GitDoc",
    "KingJames",
    "LinuxDoc",
    "MobyDick",
    "PerlDoc",
    "PythonDocs",
    "StateOfTheUnion",
    "Stdlib",
    "Text",
    "WordNet",
    "corpus_names",
    "open_corpus",
]


def corpus_names() -> list[str]:
    """What can be asked for by name; your own text is asked for by its path."""
    return [name for name in CORPORA.names() if name != "text"]


def open_corpus(name_or_path: str, *, text_field: str = "text", invalid_utf8: InvalidUtf8 = "error") -> Corpus:
    """The corpus of that name, or your own text at that path; the last two settings are for your own text.

    A name goes before a file of the same name: write ./sotu for the file.
    Raises: ConfigError if there is neither.
    """
    if name_or_path in corpus_names():
        return CORPORA[name_or_path]()
    if _looks_like_path(name_or_path):
        text = Text(path=name_or_path, text_field=text_field, invalid_utf8=invalid_utf8)
        problem = text.problem()
        if problem is None:
            return text
        raise ConfigError(f"corpus {problem}; corpora by name: {', '.join(corpus_names())}")
    raise ConfigError(
        f"unknown corpus {name_or_path!r}, and no such file or folder; available: {', '.join(corpus_names())}"
        f"{nearest(name_or_path, corpus_names())}; or give the path of your own text"
    )


def _looks_like_path(text: str) -> bool:
    return path_of(text).exists() or glob.has_magic(text) or "/" in text or bool(Path(text).suffix)
