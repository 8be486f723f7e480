"""Sinks and token views: what leaves the recorder besides its two files."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turnout.errors import ConfigError, ShapeError
from turnout.observe import sinks
from turnout.observe.recorder import Recorder
from turnout.observe.sinks import SINK_SCALARS, SINKS, is_available, open_sinks
from turnout.observe.token_view import TokenView, read_token_view, token_choices, token_view_paths, write_token_view
from turnout.tensors import Assignment


class Calls(list[Any]):
    """Stands for a package: notes every call."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.append((name, args, kwargs)) or self


def step(recorder: Recorder, number: int) -> None:
    recorder.step(number, seconds=1.0, tokens=1, loss=2.0, total_loss=2.5, lr=0.1, grad_norm=1.0, tokens_per_s=9.0)


@pytest.mark.parametrize("name", SINKS.names())
def test_a_sink_gets_the_dozen_scalars_and_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = Calls()
    package = SimpleNamespace(SummaryWriter=calls.SummaryWriter, init=calls.init, log=calls.log, finish=calls.finish)
    monkeypatch.setattr(sinks, "is_available", lambda name: True)
    monkeypatch.setattr(sinks.importlib, "import_module", lambda module: package)
    with Recorder(tmp_path / "run", (), (), sinks=[name]) as recorder:
        step(recorder, 1)
        recorder.eval(1, seconds=1.0, tokens=1, val_loss=3.0)
        recorder.event(1, "not a scalar")
    written = [call for call in calls if call[0] in ("add_scalar", "log")]
    sent = {k for _, args, _ in written for k in (args[0] if isinstance(args[0], dict) else [args[0]])}
    assert sent == {"loss", "total_loss", "val_loss", "lr", "grad_norm", "tokens_per_s"}
    assert calls[-1][0] in ("close", "finish")


def test_tensorboard_writes_its_files_into_the_run(tmp_path: Path) -> None:
    if not is_available("tensorboard"):
        pytest.skip("tensorboard is not installed")
    with Recorder(tmp_path, (), (), sinks=["tensorboard"]) as recorder:
        step(recorder, 1)
    assert any(path.stat().st_size > 100 for path in (tmp_path / "tensorboard").iterdir())


def test_no_sink_is_used_unless_it_is_named(tmp_path: Path) -> None:
    with Recorder(tmp_path, (), ()) as recorder:
        step(recorder, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]
    assert len(SINK_SCALARS) <= 12


def test_a_sink_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match="sink 'wandb' needs the package wandb: pip install wandb"):
        open_sinks(["wandb"], tmp_path)
    with pytest.raises(ConfigError, match="pip install"):
        Recorder(tmp_path / "run", (), (), sinks=["trackio"])
    assert not (tmp_path / "run").exists()


def test_a_refused_sink_leaves_no_folder_and_cuts_no_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown sink"):
        Recorder(tmp_path / "deep" / "run", (), (), sinks=["wandbb"])
    assert not list(tmp_path.iterdir())
    with Recorder(tmp_path, (), ()) as recorder:
        step(recorder, 1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="unknown sink"):
        Recorder.resume(tmp_path, 0, (), (), sinks=["wandbb"])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_sink_that_does_not_start_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise ConnectionError("not logged in")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=fails))
    monkeypatch.setattr(sinks, "is_available", lambda name: True)
    with pytest.raises(ConfigError, match="sink 'trackio' does not start: not logged in"):
        open_sinks(["trackio"], tmp_path)


def test_an_unknown_sink_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown sink 'wandbb'; available: .*; did you mean 'wandb'"):
        open_sinks(["wandbb"], tmp_path)


def test_a_sink_that_fails_is_switched_off_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    package = SimpleNamespace(init=lambda **_: None, log=fails, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.setattr(sinks, "is_available", lambda name: True)
    with Recorder(tmp_path / "run", (), (), sinks=["trackio"]) as recorder:
        with pytest.warns(UserWarning, match="sink Trackio is off from here: no route"):
            step(recorder, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(recorder, 2)


def test_token_choices_groups_a_flat_assignment_by_token() -> None:
    assignment = Assignment(
        token_N=torch.tensor([0, 2, 0, 2]),
        expert_N=torch.tensor([3, 1, 0, 2]),
        weight_N=torch.tensor([0.25, 0.5, 0.75, 0.5], requires_grad=True),
        choice_N=torch.tensor([1, 0, 0, 1]),
        num_tokens=3,
        num_experts=4,
    )
    assert token_choices(assignment) == ([[0, 3], [], [1, 2]], [[0.75, 0.25], [], [0.5, 0.5]])


def test_a_token_view_reads_back_as_it_was_written(tmp_path: Path) -> None:
    view = TokenView(
        step=3,
        tokens=["a", "\n", "\ud800"],
        layers=["x"],
        experts=[[[1, 0], [], [2]]],
        weights=[[[0.5, 0.25], [], [1.0]]],
    )
    write_token_view(tmp_path, view)
    write_token_view(tmp_path, TokenView(step=20, tokens=[], layers=["x"], experts=[[]], weights=[[]]))
    first, last = map(read_token_view, token_view_paths(tmp_path))
    assert first == view
    assert last.step == 20


def test_a_token_view_that_misses_a_token_is_refused() -> None:
    with pytest.raises(ShapeError, match="experts must list 2 tokens for each of 1 layers"):
        TokenView(step=1, tokens=["a", "b"], layers=["x"], experts=[[[0]]], weights=[[[1.0]]])
