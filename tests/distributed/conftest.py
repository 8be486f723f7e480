"""Processes that run once, however many workers the tests are spread over."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.distributed.ranks import run_cases, spawn
from tests.distributed.reshard import begin
from tests.distributed.runs import prepare_text
from turnout.train.recipes import load_recipe
from turnout.train.tuning import Plan, tune_here
from turnout.verify.parallel import verify_parallel

PATIENCE_S = 240.0


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: the folder that `make` filled, in whichever worker came first."""
    base = tmp_path_factory.getbasetemp()
    # workers of xdist have folders beside each other
    shared = base.parent if base.name.startswith("popen-") else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        try:
            folder.mkdir()
        except FileExistsError:
            return _waited_for(folder)
        try:
            make(folder)
        except BaseException as error:
            (folder / "failed").write_text(str(error), encoding="utf-8")
            raise
        (folder / "done").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def four_ranks(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The folder of the one start that all tests share: outcomes of every case, a run, a layout's check of itself."""

    def make(folder: Path) -> None:
        prepare_text(folder)
        begin(folder)
        spawn(run_cases, 4, folder)
        launch(folder)
        recipe = load_recipe("smoke", ["strategy.etp=2", "strategy.zero=3", "strategy.overlap=2"])
        rows = [vars(row) | {"holds": row.holds} for row in verify_parallel(recipe, 2)]
        (folder / "self-check.json").write_text(json.dumps(rows), encoding="utf-8")
        learned = tune_here(load_recipe("smoke"), 2, Plan(loads=(1, 2), most_steps=6), "", "it")
        (folder / "tuned.json").write_text(learned.to_json(), encoding="utf-8")

    return once("four-ranks", make)


def _waited_for(folder: Path) -> Path:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (folder / "done").exists():
            return folder
        if (folder / "failed").exists():
            pytest.fail(f"another worker could not make {folder.name}: {(folder / 'failed').read_text()[:2000]}")
        time.sleep(0.1)
    pytest.fail(f"{folder.name} was not made within {PATIENCE_S} s")
