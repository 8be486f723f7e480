"""A run on many ranks is the run of one: the same text, the same losses; and its checkpoints load at any layout."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.cases import worst
from tests.distributed.launch import STEPS as LAUNCHED_STEPS
from tests.distributed.reshard import CHAIN
from tests.distributed.reshard import RUN as RESHARDED
from tests.distributed.runs import PARTS, RUN, STEPS, recipe_of, trained
from turnout.comm import World
from turnout.config import dump_toml, from_dict
from turnout.errors import ConfigError
from turnout.strategy import Strategy
from turnout.train import checkpoint
from turnout.train.estimate import memory_per_rank
from turnout.train.recipe import Recipe
from turnout.train.recipes import load_recipe
from turnout.train.trained import load_trained
from turnout.train.tuning import Plan, tune_here
from turnout.tune import Dictionary
from turnout.verify.parallel import Compared, verify_parallel

SEQUENCE_PARALLEL = "strategy.sequence_parallel=true"


def test_a_run_goes_on_at_any_layout_and_ends_like_one_process(four_ranks: Path, tmp_path: Path) -> None:
    last = trained(four_ranks, Strategy(), four_ranks / RUN, World(), resume=True, until=1.0)
    assert any("random state of 2 ranks" in note for note in last.notes)
    whole = trained(four_ranks, Strategy(), tmp_path / "run", World(), resume=False, until=1.0)
    for name, value in whole.model.state_dict().items():
        assert worst(last.model.state_dict()[name], value) <= 1e-4, name
    for trainer in (last, whole):
        trainer.finish()
    lines = [losses(four_ranks / RUN), losses(tmp_path / "run")]
    assert len(lines[0]) == STEPS + 3
    assert worst(torch.tensor(lines[0]), torch.tensor(lines[1])) <= 1e-5


@pytest.fixture(scope="module")
def resharded(four_ranks: Path) -> list[dict[str, Any]]:
    """What each rank found at each layout."""
    return [torch.load(four_ranks / f"rank-{rank}.pt")["resharded"] for rank in range(4)]


@pytest.mark.parametrize("layout", [name for name, _, _ in CHAIN])
def test_weights_and_moments_are_the_same_bits_at_every_layout(layout: str, resharded: list[dict[str, Any]]) -> None:
    """ep 1 -> 2 -> 4 -> 1, slices and shards, in pieces and in one file: each loads what the one before it saved."""
    found = [of_rank[layout] for of_rank in resharded]
    assert [of_rank["changed"] for of_rank in found] == [[]] * 4
    assert {of_rank["step"] for of_rank in found} == {[name for name, _, _ in CHAIN].index(layout)}
    whole = resharded[0]["ep 1"]["held"]
    assert layout in ("ep 1", "ep 1 again") or all(of_rank["held"] < whole for of_rank in found)


def test_one_process_reads_what_ranks_wrote_in_pieces(four_ranks: Path) -> None:
    folder = four_ranks / RESHARDED / "checkpoints"
    first = checkpoint.load(folder / "step-0")
    for step, (_, _, in_pieces) in enumerate(CHAIN, start=1):
        loaded = checkpoint.load(folder / f"step-{step}")
        assert (folder / f"step-{step}" / "model.safetensors").exists() != in_pieces
        for part in ("model", "optimizer"):
            assert loaded.files[part].keys() == first.files[part].keys()
            assert all(torch.equal(loaded.files[part][name], each) for name, each in first.files[part].items()), step


def losses(run: Path) -> list[float]:
    """Training and validation losses in the order they were recorded."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines if line["kind"] in ("step", "eval")]


def test_ranks_of_one_run_draw_their_own_noise(four_ranks: Path) -> None:
    """The checkpoint holds a random state for each rank, and no two are alike."""
    states: list[Tensor] = []
    step = round(PARTS[4][0][-1] * STEPS)
    loaded = checkpoint.load(four_ranks / RUN / "checkpoints" / f"step-{step}")
    for rank in range(4):
        states.append(loaded.files["rng"]["torch_cpu" if rank == 0 else f"rank-{rank}/torch_cpu"])
    assert all(not torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])


def test_what_experts_sent_is_recorded(four_ranks: Path) -> None:
    first, *_ = [json.loads(line) for line in (four_ranks / RUN / "metrics.jsonl").read_text().splitlines()]
    # 2 layers; counts apart, rows there and back in the forward and in the backward pass
    assert first["sent"]["intra_messages"] == 2 * 4
    assert first["sent"]["intra_bytes"] > 0
    assert first["sent"]["inter_bytes"] == first["sent"]["inter_messages"] == 0


def test_tensor_parallel_ranks_need_memory_for_their_parts_alone() -> None:
    wide = ["model.hidden=4096", "loop.batch_size=2", "loop.seq_len=8"]
    apart, shared = (memory_per_rank(load_recipe("tiny-dense", [*wide, f"strategy.tp={tp}"]), 2) for tp in (1, 2))
    assert shared < 0.7 * apart, "weights, gradients and moments"
    long = ["strategy.tp=2", "loop.batch_size=64"]
    whole, own = (memory_per_rank(load_recipe("tiny-dense", [*long, *more]), 2) for more in ([], [SEQUENCE_PARALLEL]))
    assert own < 0.7 * whole, "activations"
    # what only tensor-parallel ranks refuse
    assert memory_per_rank(load_recipe("smoke", ['model.attention.qk_norm="full"']), 2) > 0


def test_the_strategy_of_a_recipe_survives_toml(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, Strategy(ep=4, alltoall="node_dedup"))
    assert from_dict(Recipe, tomllib.loads(dump_toml(recipe))) == recipe


def test_turnout_train_needs_nothing_but_the_strategy(four_ranks: Path) -> None:
    run, said = four_ranks / "launched", (four_ranks / "launched.err").read_text()
    summary = json.loads((four_ranks / "launched.out").read_text().strip().splitlines()[-1])
    assert summary["steps"] == LAUNCHED_STEPS
    assert summary["val_loss"] is not None
    assert "experts over 2 ranks by flat" in said
    learned = Dictionary.from_json((run / "strategies.json").read_text(), "strategies.json")
    # the run was killed and went on from a checkpoint; the first step of either start is no measure
    measured = sum(trial.steps for entry in learned.entries.values() for trial in entry.trials.values())
    assert 0 < measured <= 2 * (LAUNCHED_STEPS - 1)
    assert (run / "report.html").is_file()
    model = load_trained(run).model
    moe = model.config.moe
    assert moe is not None
    assert all(layer.experts.num_experts == moe.num_experts for _, layer in model.moe_blocks())


def test_a_layout_checks_itself_against_one_process(four_ranks: Path) -> None:
    rows = json.loads((four_ranks / "self-check.json").read_text())
    assert {"logits", "loss", "statistics of blocks.1", "gradient of blocks.0.ffn.experts.up_EDG"} <= {
        row["name"] for row in rows
    }
    assert all(row["holds"] for row in rows)
    assert max(row["error"] for row in rows) > 0, (
        "experts add up in another order: exactly equal would be no comparison"
    )


def test_what_is_not_equal_is_not_passed() -> None:
    assert not Compared(name="x", error=float("nan"), tolerance=1e-10).holds
    with pytest.raises(ConfigError, match="ranks=1 must be at least 2"):
        verify_parallel(load_recipe("smoke"), 1)


def test_tune_measures_a_recipe_on_ranks_of_this_machine(four_ranks: Path) -> None:
    learned = Dictionary.from_json((four_ranks / "tuned.json").read_text(), "tuned.json")
    assert learned.hardware.ranks == 2
    assert learned.hardware.flops_per_s > 0
    # twice six steps, the first of which is no measure
    assert sum(trial.steps for entry in learned.entries.values() for trial in entry.trials.values()) <= 11
    assert len({choice for entry in learned.entries.values() for choice in entry.trials}) > 1


def test_one_process_has_nothing_to_tune() -> None:
    with pytest.raises(ConfigError, match=r"ranks=1 must be at least 2"):
        tune_here(load_recipe("smoke"), 1, Plan(), "", "")
    with pytest.raises(ConfigError, match=r"loads=\(0,\) and steps=200 must be at least 1"):
        Plan(loads=(0,))
