"""Every test runs on one thread, finds NaN wherever memory was taken but not written, and may call the command line."""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from torch.utils import deterministic

from turnout.cache import kernel_cache
from turnout.cli import main as cli

settings.register_profile("turnout", deadline=None, derandomize=True, database=None)
settings.load_profile("turnout")
torch.set_num_threads(1)
# tests with a cache of their own would compile the kernel once more each
os.environ.setdefault("TURNOUT_KERNELS", str(kernel_cache()))


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def message(self) -> str:
        """The error without its line breaks."""
        return " ".join(self.err.split())


Turnout = Callable[..., Result]


@pytest.fixture
def turnout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Turnout:
    """Runs the command line in this process."""
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path_factory.mktemp("cli-cache")))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def run(*args: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["turnout", *args])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (the largest integer for integers); ops without a fixed order warn."""
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    deterministic.fill_uninitialized_memory = fill
