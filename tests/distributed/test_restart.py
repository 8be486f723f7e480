"""A rank that is killed: torchrun starts the job again, which goes on where it was and ends as if nothing had been."""

import os
import re
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import Store, TCPStore

from tests.distributed.cases import worst
from tests.distributed.launch import RUN, STEPS, kill_at_random, kills, started, write_home
from turnout.cli.training import place
from turnout.comm import elastic
from turnout.data.prepare import prepare
from turnout.errors import ConfigError, TransportError
from turnout.train import checkpoint
from turnout.train.loop import Trainer
from turnout.train.recipes import load_recipe
from turnout.train.signals import StopRequest
from turnout.train.trained import load_trained

# TURNOUT_KILLS=20 for a look as long as one likes; every kill costs a start
KILLS, LONGEST_S = int(os.environ.get("TURNOUT_KILLS", "5")), 1.5
MANY_STEPS, RESTARTS = 200 + 40 * KILLS, KILLS + 4


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of torchrun's agent, which outlives the workers, and the variables that tell them of it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_ranks_never_meet_in_the_store_of_dead_ones(agent: TCPStore) -> None:
    dead = elastic.fresh_store(0, timeout_s=20)
    assert dead is not None
    dead.set("0", "an address of the first generation")
    del dead
    found: list[Store | None] = []
    waiting = threading.Thread(target=lambda: found.append(elastic.fresh_store(1, timeout_s=20)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive(), "what the agent still says of the first generation must not do"
    first = elastic.fresh_store(0, timeout_s=20)
    waiting.join(20)
    assert first is not None
    assert found[0] is not None
    first.set("1", "an address of the second")
    assert found[0].get("1") == b"an address of the second"
    assert not found[0].check(["0"])


def test_a_rank_whose_first_rank_does_not_come_says_so(agent: TCPStore) -> None:
    with pytest.raises(TransportError, match=r"rank 1 waited 0 s for rank 0 to open a store"):
        elastic.fresh_store(1, timeout_s=0.3)


def test_without_an_agent_there_is_no_store_and_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert elastic.fresh_store(0, timeout_s=1) is None
    elastic.remember_run("somewhere")
    assert elastic.begun_run() is None


def test_a_restarted_job_goes_on_in_the_run_it_began_and_in_no_other(
    agent: TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run, taken = tmp_path / "run", tmp_path / "taken"
    taken.mkdir()
    (taken / "recipe.toml").write_text("of somebody else", encoding="utf-8")
    for _ in range(2):
        # a restart refuses again what the start refused
        with pytest.raises(ConfigError, match="already holds a run or its recipe"):
            place("smoke", taken, None)
    assert place("smoke", run, None) == (run, False)
    # killed before there was anything to go on from
    assert place("smoke", run, None) == (run, False)
    run.mkdir()
    (run / "recipe.toml").touch()
    assert place("smoke", run, None) == (run, True)
    assert place("smoke", None, None) == (run, True)


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_it_had_not_been(
    four_ranks: Path, tmp_path: Path
) -> None:
    run, said = four_ranks / RUN, (four_ranks / f"{RUN}.err").read_text()
    assert kills(run) == [1]
    assert "torchrun restarted this job: it goes on" in said
    # torchrun may end the other rank before it has said what it saw; if it says something, then this
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert all(
        re.match(r"error: rank 0: .* failed, because one of them ended or took too long", line) for line in errors
    )
    assert "Traceback" not in said
    recipe = load_recipe(str(run / "recipe.toml"), ["strategy.ep=1"])
    whole = Trainer(recipe, prepare(recipe.data, four_ranks / "home" / "cache"), tmp_path / "run")
    assert whole.train(StopRequest()) == "done"
    assert checkpoint.load(run).meta["counters"]["step"] == whole.counters.step == STEPS
    ended = load_trained(run).model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert worst(ended[name], value) <= 1e-4, name
    whole.close()


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_a_job_killed_at_random_moments_ends_with_the_undisturbed_weights(tmp_path: Path) -> None:
    write_home(tmp_path)
    # a tuner goes by the clock, and sums in another order differ in their last bits
    settings = ("strategy.ep=2", f"loop.steps={MANY_STEPS}", "loop.eval_every=100", "loop.save_every=20")
    started(tmp_path, "calm", settings)
    disturb = partial(kill_at_random, tmp_path / "wild", KILLS, LONGEST_S)
    started(tmp_path, "wild", settings, restarts=RESTARTS, disturb=disturb)
    assert len(kills(tmp_path / "wild")) == KILLS
    calm, wild = (checkpoint.load(tmp_path / name) for name in ("calm", "wild"))
    assert wild.meta["counters"]["step"] == MANY_STEPS
    for part in ("model", "optimizer"):
        assert calm.files[part].keys() == wild.files[part].keys()
        for name, value in calm.files[part].items():
            assert torch.equal(wild.files[part][name], value), name
