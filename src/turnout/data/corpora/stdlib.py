"""The Python standard library's own source: real text on every machine, with nothing to fetch."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.corpora.contract import CORPORA, Corpus, Document
from turnout.data.corpora.files import file_documents, fingerprint_files
from turnout.errors import DataError

# installed packages are not the standard library; the others hold the paths of the machine Python was built on
_NOT_OURS = ("site-packages", "dist-packages", "config-", "_sysconfigdata")


@CORPORA.register("stdlib")
@dataclass(frozen=True, kw_only=True)
class Stdlib(Corpus):
    """Every .py file of the running interpreter's standard library, in the order of their names.

    Its test packages belong to it where they are installed: hand-written Python too, and more than half of the
    text (Debian packages them apart). Four files are not UTF-8 on purpose, to test Python's own decoder: they are
    left out, and so are empty files.
    Measured on CPython 3.11.7: 1,756 documents, 31,473,174 bytes; 9.4 M tokens of a vocabulary of 4,096.
    """

    title: ClassVar[str] = "Python standard library source"
    licence: ClassVar[str] = "PSF-2.0"
    size_bytes: ClassVar[int] = 31_500_000
    languages: ClassVar[tuple[str, ...]] = ("en",)
    obtained: ClassVar[str] = "Read from the running interpreter; nothing is fetched."

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def problem(self) -> str | None:
        if _stdlib_files():
            return None
        return f"this Python has no .py source in {_stdlib_folder()}; use an ordinary CPython or another corpus"

    def location(self, cache: Path) -> Path:
        return _stdlib_folder()

    def fingerprint(self, cache: Path) -> str:
        return fingerprint_files(_stdlib_files(), _stdlib_folder())

    def documents(self, cache: Path) -> Iterator[Document]:
        problem = self.problem()
        if problem is not None:
            raise DataError(f"corpus 'stdlib': {problem}")
        return file_documents(_stdlib_files(), _stdlib_folder(), "skip")


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[Path]:
    if not _stdlib_folder().is_dir():
        return []
    ours = [entry for entry in _stdlib_folder().iterdir() if not entry.name.startswith(_NOT_OURS)]
    nested = [file for entry in ours if entry.is_dir() for file in entry.rglob("*.py")]
    return [entry for entry in ours if entry.suffix == ".py"] + nested
