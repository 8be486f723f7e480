"""Two revisions of Turnout compared: the same command with either's code, in turns, in processes of their own.

Both are started alike, by the command line that a user types. The base's code is taken out of the repository that the
running code lies in, into a folder that is removed afterwards; compiled kernels are cached by their source.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import turnout
from turnout.bench.race import Timing, ratio
from turnout.bench.run import ratio_keys, result
from turnout.errors import ConfigError, TurnoutError

PACKAGE = Path(turnout.__file__).parent
_NOW = "the code at hand"
_START = """
import sys, turnout
folder = sys.argv.pop(1)
assert turnout.__file__.startswith(folder), f"{turnout.__file__} came before {folder}"
from turnout.cli.main import main
main()
"""
# what makes two rows of the two sides the same measurement
_SIZES = ("shape", "tokens", "skew", "model", "batch", "prompt", "new")
_IDENTITY = ("case", "peer", *_SIZES, "mode", "dtype", "threads")
Key = tuple[str, ...]
Rows = dict[Key, dict[str, Any]]


def compare(
    base: str, commands: Sequence[Sequence[str]], *, is_own: Callable[[str], bool], turns: int
) -> dict[str, Any]:
    """A row for each of the commands' rows whose peer `is_own`: what the base took over what the code at hand took.

    `commands`: words behind `turnout bench`. In each turn all of them run with the base's code, then with that at hand.
    Raises: ConfigError if the code lies in no git checkout, there is no such revision, or it does not take a command;
    TurnoutError if a process fails, or the two have no row in common.
    """
    commit = _commit(base)
    turn_by_turn: list[tuple[Rows, Rows]] = []
    with _source_of(commit, base) as folder:
        sides = ((f"the base {base!r}", folder), (_NOW, PACKAGE.parent))
        for _ in range(turns):
            before, now = (_measured(name, source, commands, is_own) for name, source in sides)
            turn_by_turn.append((before, now))
    before, now = turn_by_turn[0]
    rows = [_row(key, turn_by_turn) for key in now if key in before]
    if not rows:
        had, has = (", ".join(dict.fromkeys(row["peer"] for row in side.values())) for side in (before, now))
        raise TurnoutError(
            f"nothing to compare: the base {base!r} measured {had or 'nothing'}, {_NOW} {has or 'nothing'}"
        )
    return result(
        rows,
        base={"revision": base, "commit": commit, "turns": turns},
        not_in_base=[now[key]["peer"] for key in now if key not in before],
        only_in_base=[before[key]["peer"] for key in before if key not in now],
    )


def _row(key: Key, turn_by_turn: Sequence[tuple[Rows, Rows]]) -> dict[str, Any]:
    now = turn_by_turn[0][1][key]
    before, after = (Timing(ms=tuple(turn[side][key]["ms_median"] for turn in turn_by_turn)) for side in (0, 1))
    return {
        **{name: now.get(name) for name in _IDENTITY},
        "base_ms": list(before.ms),
        "base_ms_median": before.median,
        "ms": list(after.ms),
        "ms_median": after.median,
        **ratio_keys("base_over_now", ratio(before, after)),
    }


def _measured(side: str, source: Path, commands: Sequence[Sequence[str]], is_own: Callable[[str], bool]) -> Rows:
    """Medians of one turn. Whoever has none, where masks do not fit, is not compared."""
    rows = [row for words in commands for row in _rows(side, source, words)]
    own = [row for row in rows if is_own(row["peer"]) and row["ms_median"] is not None]
    return {tuple(json.dumps(row.get(name), sort_keys=True) for name in _IDENTITY): row for row in own}


def _rows(side: str, source: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """What `turnout bench WORDS` measures with the code in `source`."""
    path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    # a package of the folder one stands in does not come first, and errors are not broken into lines
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "COLUMNS": "1000", "TERM": "dumb"}
    command = [sys.executable, "-c", _START, str(source), "bench", *words, "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        typed = f"turnout bench {' '.join(words)}"
        said = _last_words(done.stderr) or f"exit {done.returncode}"
        if done.returncode == 2 and side != _NOW:
            raise ConfigError(f"{side} does not take {typed!r}: {said}; compare what both have, or a later revision")
        raise TurnoutError(f"{typed!r} fails with {side}: {said}")
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def _last_words(text: str) -> str:
    """Of the last line that says something; bad options are said in a frame."""
    lines = [line.strip("╭─╮│╰╯ ") for line in text.splitlines()]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line), "")


def _commit(revision: str) -> str:
    """Raises: ConfigError if the running code lies in no checkout, or there is no such revision."""
    tracked = _git("ls-files", "--error-unmatch", "__init__.py")
    if tracked.returncode:
        why = tracked.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(
            f"--base needs Turnout to run from a git checkout; {PACKAGE} is in none ({why[0] if why else 'git failed'})"
        )
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise ConfigError(f"--base {revision!r} is no revision of the checkout {PACKAGE} lies in; see `git log`")
    return found.stdout.decode().strip()


@contextmanager
def _source_of(commit: str, revision: str) -> Iterator[Path]:
    """The folder that holds the package as it was, for as long as it is needed."""
    # of the folder git stands in alone, by paths that begin there
    packed = _git("archive", "--format=tar", commit, ".")
    if packed.returncode:
        raise ConfigError(f"--base {revision!r} has no folder {PACKAGE.name!r} where the code at hand has it")
    with TemporaryDirectory(prefix="turnout-base-") as folder:
        source = Path(folder).resolve()
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(source / PACKAGE.name, filter="data")
        yield source


def _git(*words: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(PACKAGE), *words], check=False, capture_output=True)
    except FileNotFoundError as error:
        raise ConfigError("--base needs git, which is not installed here") from error
