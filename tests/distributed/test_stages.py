"""Pipeline stages equal one process: losses, statistics, weights after steps; and a run of them is a run like any."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.cases import LENGTH, tolerance, worst
from tests.distributed.launch import started, write_home
from tests.distributed.ranks import MAX_NORM, numbers, spawn, summary
from tests.distributed.runs import STEPS, prepare_text, trained
from tests.distributed.stage_cases import (
    SEQUENCES,
    StageCase,
    batches_of,
    eight_cases,
    in_one_process,
    optimizer_of,
    stage_cases,
    staged_decoder,
)
from tests.distributed.stage_ranks import ACCUMULATE, RUN, run_eight, run_stages
from turnout import Strategy
from turnout.comm import World
from turnout.infer.generate import GenerateConfig, generate
from turnout.parallel import cut_of
from turnout.plan.shapes import SHAPES
from turnout.plan.step import Step
from turnout.plan.volume import pipeline_volume
from turnout.train.device import autocast_for
from turnout.train.recipes import load_recipe
from turnout.train.step import train_step
from turnout.train.trained import load_trained
from turnout.verify.parallel import verify_parallel

CASES = list(stage_cases())
CURVE = 1e-6  # of the losses of many steps
LAUNCHED, LAUNCHED_STEPS = "launched", 4
Outcomes = list[dict[str, Any]]


@pytest.fixture(scope="session")
def staged(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The folder of the one start that these tests share."""

    def make(folder: Path) -> None:
        prepare_text(folder)
        spawn(run_stages, 4, folder)

    return once("staged", make)


@cache
def outcomes_of(folder: Path) -> Outcomes:
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]


@cache
def alone(case: StageCase) -> tuple[list[tuple[Tensor, list[Tensor]]], dict[str, Any], Tensor]:
    """The same steps in this process, every text's micro-batches one after another; and the hidden states after."""
    model = staged_decoder(in_one_process(case))
    optim = optimizer_of(case, model)
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    found = []
    for step in range(case.steps):
        every = [batch for text in batches_of(case, step) for batch in text]
        result = train_step(model, model.loss, optim, every, max_norm=MAX_NORM, autocast=autocast)
        found.append((summary(result), [numbers(stats) for stats in result.stats]))
    with torch.no_grad():
        every = [batch for text in batches_of(case, 0) for batch in text]
        hidden = torch.cat([model(batch.tokens_BS, mask_BS=batch.mask_BS).h_BSD for batch in every])
    return found, model.state_dict(), hidden


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_of_stages_equal_one_process(case: StageCase, staged: Path) -> None:
    found = [outcomes_of(staged)[rank][case.name] for rank in range(case.ranks)]
    want, state, hidden = alone(case)
    limit = tolerance(case.dtype) if case.steps < 10 else CURVE
    for rank, got in enumerate(found):
        for step, (result, stats) in enumerate(want):
            assert worst(got["results"][step], result) <= limit, (rank, step)
            assert len(got["stats"][step]) == len(stats)
            for layer, numbers_ in enumerate(stats):
                assert worst(got["stats"][step][layer], numbers_) <= limit, (rank, step, layer)
    assert found[0]["state"].keys() == state.keys()
    for name, value in state.items():
        assert worst(found[0]["state"][name], value) <= limit, name
    # the last stage's ranks have it, each that of its own text
    first = case.ranks - case.ranks // case.pp
    assert not any(got["hidden"] for got in found[:first])
    ends = torch.cat([h_BSD for got in found[first :: case.tp] for h_BSD in got["hidden"]])
    assert worst(ends, hidden) <= limit


@pytest.mark.slow
def test_stages_with_tensor_parallel_and_shards_equal_one_process(tmp_path: Path) -> None:
    spawn(run_eight, 8, tmp_path)
    of_ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(8)]
    for case in eight_cases():
        want, state, _ = alone(case)
        for got in (outcome[case.name] for outcome in of_ranks):
            assert max(worst(got["results"][step], result) for step, (result, _) in enumerate(want)) <= 1e-10
        assert max(worst(of_ranks[0][case.name]["state"][name], value) for name, value in state.items()) <= 1e-10


def counts_ahead(case: StageCase) -> bool:
    """Whether a loss sends every micro-batch through the stages once more, of which the planner knows nothing."""
    return case.accumulate > 1 and any(loss.spans_step for loss in case.losses)


@pytest.mark.parametrize("case", [case for case in CASES if not counts_ahead(case)], ids=lambda case: case.name)
def test_the_busiest_rank_sends_what_the_planner_says(case: StageCase, staged: Path) -> None:
    sent = [outcomes_of(staged)[rank][case.name]["sent"] for rank in range(case.ranks)]
    strategy = replace(case.strategy, precision="fp32").check(case.ranks, num_experts=8)
    step = Step(
        shape=replace(SHAPES["mixtral-8x7b"], dim=16),
        strategy=strategy,
        devices_per_node=case.ranks,
        tokens=SEQUENCES * LENGTH * case.accumulate,
        micro_batches=case.accumulate,
    )
    (want,) = pipeline_volume(step)
    widening = case.dtype.itemsize // 4
    assert max(sent) == (widening * want.total_bytes, want.messages)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_rank_keeps_its_own_blocks_alone(case: StageCase, staged: Path) -> None:
    whole = sum(weight.numel() for weight in staged_decoder(case).parameters())
    assert all(sum(outcomes_of(staged)[rank][case.name]["kept"].values()) < whole for rank in range(case.ranks))


@pytest.mark.parametrize("case", [case for case in CASES if case.zero], ids=lambda case: case.name)
def test_ranks_of_a_stage_have_its_blocks_between_them(case: StageCase, staged: Path) -> None:
    """No number of a block lies on two of them; what stands beside the blocks is whole."""
    each = case.ranks // case.pp
    of_ranks = [outcomes_of(staged)[rank][case.name]["kept"] for rank in range(case.ranks)]
    whole = {name: weight.numel() for name, weight in staged_decoder(case).named_parameters()}
    for first in range(0, case.ranks, each):
        stage = of_ranks[first : first + each]
        for name in stage[0]:
            found = sum(kept[name] for kept in stage)
            assert found == (whole[name] if name.startswith("blocks.") else each * whole[name]), name


def test_the_steps_are_clipped(staged: Path) -> None:
    assert min(float(outcomes_of(staged)[0][case.name]["results"][0][2]) for case in CASES) > MAX_NORM


def test_a_run_of_stages_ends_like_that_of_one_process(staged: Path, tmp_path: Path) -> None:
    """Two stages on four ranks, with experts over ranks, on two ranks, no stages, and one process at the end."""
    more = {"accumulate": ACCUMULATE}
    last = trained(staged, Strategy(), staged / RUN, World(), resume=True, until=1.0, **more)
    whole = trained(staged, Strategy(), tmp_path / "run", World(), resume=False, until=1.0, **more)
    for name, value in whole.model.state_dict().items():
        assert worst(last.model.state_dict()[name], value) <= 1e-4, name
    for trainer in (last, whole):
        trainer.finish()
    lines = [recorded(staged / RUN), recorded(tmp_path / "run")]
    assert len(lines[0]) == STEPS + 3
    assert worst(torch.tensor(lines[0]), torch.tensor(lines[1])) <= 1e-5


def recorded(run: Path) -> list[float]:
    """Training and validation losses, and what every layer's routing was like, in the order they were recorded."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines if line["kind"] in ("step", "eval")]


def test_a_stage_is_no_model(staged: Path) -> None:
    for rank in range(2):
        said = outcomes_of(staged)[rank]["refused"]
        assert "ConfigError: this rank has some stages of the model, and a pass goes through all" in said["a pass"]
        assert "ConfigError: all micro-batches of a pipeline must have one shape" in said["two shapes"]
        assert "ConfigError: loop.accumulate=1 micro-batches do not fill the pipeline" in said["too few"]
        assert "ConfigError: the model is laid out already" in said["twice"]


def test_what_is_not_finite_on_one_stage_is_named_on_all(staged: Path) -> None:
    said = [outcomes_of(staged)[rank]["poisoned"] for rank in range(2)]
    assert said == ["weight blocks.2.ffn_norm.weight_D: 1 of 16 values are NaN (rank 1)"] * 2


def test_a_rank_that_waits_for_a_stage_says_whose_it_is(staged: Path) -> None:
    waiting, sleeping = (outcomes_of(staged)[rank]["stalled"] for rank in range(2))
    assert not sleeping
    assert waiting
    assert "in the pipeline of stages: rank 1 is not there yet" in waiting[0]


def test_a_rank_whose_next_stage_is_gone_says_so(staged: Path) -> None:
    said = outcomes_of(staged)[0]["alone"]
    assert said.startswith("TransportError: rank 0: the pipeline of stages failed, because a rank of it ended"), said


def test_turnout_train_needs_nothing_but_the_strategy(tmp_path: Path) -> None:
    """Under torchrun, with the names that the banner has for it; and one process writes with what they learned."""
    write_home(tmp_path)
    settings = ("strategy.pp=2", "loop.accumulate=2", f"loop.steps={LAUNCHED_STEPS}")
    started(tmp_path, LAUNCHED, settings)
    said = (tmp_path / f"{LAUNCHED}.err").read_text()
    summary_ = json.loads((tmp_path / f"{LAUNCHED}.out").read_text().strip().splitlines()[-1])
    assert summary_["steps"] == LAUNCHED_STEPS
    assert summary_["val_loss"] is not None
    assert "2 stages of 1, 1 blocks on 2 ranks by 1f1b, 2 micro-batches a step" in said
    view = json.loads(next((tmp_path / LAUNCHED / "trace").glob("tokens-step-*.json")).read_text())
    assert view["layers"] == ["blocks.0", "blocks.1"]
    steps = [json.loads(line) for line in (tmp_path / LAUNCHED / "metrics.jsonl").read_text().splitlines()]
    # 2 choices of every token in either layer
    assert all(line["entropy"] > 0 for line in steps if line["kind"] == "step")
    run = load_trained(tmp_path / LAUNCHED)
    assert "".join(generate(run.model, run.tokenizer, "a router", GenerateConfig(max_new_tokens=8)))


def test_a_layout_of_stages_checks_itself_against_one_process() -> None:
    recipe = load_recipe("smoke", ["strategy.pp=2", "loop.accumulate=2", "model.num_layers=3"])
    rows = {row.name: row for row in verify_parallel(recipe, 2)}
    assert {"logits", "loss", "statistics of blocks.2", "gradient of blocks.0.ffn.experts.up_EDG"} <= rows.keys()
    assert {"gradient of embedding_VD", "gradient of norm.weight_D"} <= rows.keys()
    assert all(row.holds for row in rows.values())
    assert max(row.error for row in rows.values()) > 0, "sums in another order: exactly equal would be no comparison"


@pytest.mark.parametrize(("layers", "stages", "want"), [(4, 2, [2, 2]), (5, 4, [1, 2, 1, 1]), (8, 3, [3, 3, 2])])
def test_uneven_cuts_leave_the_ends_short(layers: int, stages: int, want: list[int]) -> None:
    config = load_recipe("smoke", [f"model.num_layers={layers}"]).model
    cuts = [cut_of(config, Strategy(pp=stages), place) for place in range(stages)]
    assert [len(part) for part in cuts[0].layers] == want
    assert [layer for part in cuts[0].layers for layer in part] == list(range(layers))
    assert [cut.own for cut in cuts] == [(place,) for place in range(stages)]
