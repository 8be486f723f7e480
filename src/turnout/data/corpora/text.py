"""Your own text: a file, a folder or a glob; plain text or JSON lines."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.cache import path_of
from turnout.data.corpora.contract import CORPORA, Corpus, Document
from turnout.data.corpora.files import file_documents, fingerprint_files, named_under
from turnout.data.jsonl import read_jsonl
from turnout.data.utf8 import InvalidUtf8
from turnout.errors import ConfigError, DataError

# what is read out of a folder; a file named outright, or by a glob, is read whatever its suffix
SUFFIXES = (
    *(".txt", ".md", ".rst", ".jsonl", ".tex", ".org", ".html", ".csv"),
    *(".py", ".c", ".h", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql", ".toml", ".yaml"),
)


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """One document a file, or one a line for .jsonl; folders are searched to the bottom, hidden names left out."""

    path: str = ""  # a file, a folder, or a glob such as notes/**/*.md
    text_field: str = "text"  # field of a .jsonl line that holds the text
    invalid_utf8: InvalidUtf8 = "error"  # what to do with bytes that are not UTF-8

    title: ClassVar[str] = "Your own files"
    licence: ClassVar[str] = "whatever yours is"
    size_bytes: ClassVar[int] = 0
    languages: ClassVar[tuple[str, ...]] = ()
    obtained: ClassVar[str] = "Read in place from a file, folder or glob: give the path instead of a name."

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def problem(self) -> str | None:
        if not self.path:
            return "needs a path: give a file, folder or glob instead of the name"
        if not glob.has_magic(self.path) and not path_of(self.path).exists():
            return f"path {self.path!r} does not exist"
        return None

    def location(self, cache: Path) -> Path:
        return self._root()

    def fingerprint(self, cache: Path) -> str:
        return fingerprint_files(self._files(), self._root())

    def documents(self, cache: Path) -> Iterator[Document]:
        root = self._root()
        for name, file in named_under(self._files(), root):
            if file.suffix.lower() == ".jsonl":
                yield from self._lines(file, name)
            else:
                yield from file_documents([file], root, self.invalid_utf8)

    def _lines(self, file: Path, name: str) -> Iterator[Document]:
        for number, text, _ in read_jsonl(file, self.text_field, self.invalid_utf8):
            yield Document(name=f"{name}:{number}", text=text)

    def _root(self) -> Path:
        path = path_of(self.path)
        if glob.has_magic(self.path) and not path.exists():
            fixed = [index for index, part in enumerate(path.parts) if glob.has_magic(part)]
            return Path(*path.parts[: fixed[0]])
        return path if path.is_dir() else path.parent

    def _files(self) -> list[Path]:
        problem = self.problem()
        if problem is not None:
            raise ConfigError(f"corpus {problem}")
        path, root = path_of(self.path), self._root()
        if path.is_file():
            return [path]
        if path.is_dir():
            found = [file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and not _hidden(file, root)]
        else:
            found = [Path(file) for file in glob.glob(str(path), recursive=True)]
        files = [file for file in found if file.is_file()]
        if not files:
            raise DataError(f"no text in {self.path!r}; a folder is searched for: {' '.join(SUFFIXES)}")
        return files


# a call, not a decorator: type checkers go on seeing this class and its settings
CORPORA.register("text")(Text)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
