"""Experts that move while a model trains: the run is the one in which they stay, and what is said of a move is so."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import optim

from tests.distributed.cases import TrainCase, decoder, texts, worst
from tests.distributed.ranks import Outcome, spawn
from tests.distributed.runs import STEPS, assert_restored, dataset_of, prepare_text, recipe_of
from turnout import MoE, Strategy
from turnout.balance import Machine
from turnout.comm import World
from turnout.errors import ConfigError
from turnout.layers import MoEConfig
from turnout.losses import Locality
from turnout.models import Decoder
from turnout.parallel import Parallel, apply
from turnout.parallel.moves import move_bytes, moved, placements_of
from turnout.parallel.rebalancer import Rebalancer, Rebalancing
from turnout.placement import Placement
from turnout.routers import DeepSeekV3, TopK
from turnout.tensors import MoEStats
from turnout.topology import Link
from turnout.trace import read_sources, read_trace
from turnout.train import checkpoint
from turnout.train.device import autocast_for
from turnout.train.loop import Trainer
from turnout.train.recipe import Recipe
from turnout.train.signals import StopRequest
from turnout.train.step import train_step

RANKS, HOST, EXPERTS = 4, 2, 8
MIXED, UNEVEN = (3, 0, 2, 1, 1, 2, 0, 3), (0, 3, 3, 0, 1, 3, 2, 3)
EVERY, STOPPED_AT = 2, 5  # steps between questions; a stop between two of them
SLOW = """
base = "dgx-h100"
[device]
peak_flops_per_s = {fp32 = "1 GFLOP/s"}
[intra]
bytes_per_s = "10 GB/s"
[inter]
bytes_per_s = "100 MB/s"
"""


@pytest.fixture(scope="module")
def outcomes(once: Any) -> tuple[Path, list[Outcome]]:
    """The folder of four ranks on two hosts, and what each wrote down."""

    def make(folder: Path) -> None:
        prepare_text(folder)
        (folder / "slow.toml").write_text(SLOW)
        spawn(work, RANKS, folder)

    folder = once("moves", make)
    return folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def work(world: World, folder: Path) -> None:
    on_hosts = replace(world, local_size=HOST)
    found: Outcome = {f"{adam} {dtype}": bits(on_hosts, adam, dtype) for adam in (True, False) for dtype in DTYPES}
    found["near"] = near(on_hosts)
    found["refused"] = refused(on_hosts)
    found["decided"] = decided(on_hosts)
    found["sources"] = sources(world)
    found["runs"] = runs(on_hosts, folder)
    torch.save(found, folder / f"rank-{world.rank}.pt")


# --- bits ---

DTYPES = (torch.float64, torch.float32)


def bits(world: World, adam: bool, dtype: torch.dtype) -> list[str]:
    """What differs between a run whose experts move and one in which they stay; norms that clip would be sums in
    another order, so nothing is clipped.
    """
    case = TrainCase(adam=adam, dtype=dtype, local=HOST, bias=True)
    ends = []
    for moves in ((), (MIXED, UNEVEN)):
        model = decoder(case)
        parallel = apply(model, case.strategy, world=world)
        optimizer = optim.AdamW(model.parameters()) if adam else optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        weights = dict(model.named_parameters())
        losses = []
        for step in range(4):
            if step and moves[step - 1 : step]:
                to = dict.fromkeys(placements_of(model, parallel), Placement.of(moves[step - 1], RANKS))
                parallel = moved(model, parallel, optimizer, to)
                assert all(weights[name] is weight for name, weight in model.named_parameters())
                assert placements_of(model, parallel) == to
            mine, autocast = texts(case, step)[world.rank], autocast_for(torch.device("cpu"), torch.float32)
            losses.append(
                train_step(
                    model, model.loss, optimizer, mine, max_norm=math.inf, autocast=autocast, parallel=parallel
                ).loss
            )
        moments = {
            f"{name}/{key}": value
            for name, weight in model.named_parameters()
            for key, value in optimizer.state[weight].items()
            if value.ndim
        }
        whole = parallel.shards.whole(model.state_dict() | moments)
        ends.append(whole | {"losses": torch.tensor(losses, dtype=torch.float64)})
    if not parallel.shards.has_first:
        return []
    return [name for name, value in ends[0].items() if not torch.equal(ends[1][name], value)]


@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_whose_experts_move_is_the_same_to_the_bit(
    adam: bool, dtype: torch.dtype, outcomes: tuple[Path, list[Outcome]]
) -> None:
    _, found = outcomes
    assert found[0][f"{adam} {dtype}"] == []


# --- which experts are near ---


def near(world: World) -> tuple[int, ...]:
    """The experts that the locality loss draws to, after a move."""
    torch.manual_seed(0)
    layer = MoE(6, 4, EXPERTS, losses=(Locality(),))
    parallel = apply(layer, Strategy(ep=4), world=world)
    moved(layer, parallel, None, {"": Placement.of(UNEVEN, RANKS)})
    assert isinstance(layer.losses[0], Locality)
    return layer.losses[0].local


def test_the_locality_loss_draws_to_the_experts_that_came(outcomes: tuple[Path, list[Outcome]]) -> None:
    host = [tuple(expert for expert, rank in enumerate(UNEVEN) if rank // HOST == at) for at in range(2)]
    assert [outcome["near"] for outcome in outcomes[1]] == [host[0], host[0], host[1], host[1]]


# --- refusals ---


def refused(world: World) -> dict[str, str]:
    """What is said where experts cannot move; every rank says it, before anything is sent."""

    def laid_out(strategy: Strategy) -> tuple[Decoder, Parallel]:
        model = decoder(TrainCase(local=HOST))
        return model, apply(model, strategy, world=world)

    def said(model: Decoder, parallel: Parallel, to: Placement, layer: str = "blocks.0.ffn", **other: Any) -> str:
        try:
            move_bytes(model, parallel, other.get("optimizer"), {layer: to})
        except ConfigError as error:
            return str(error)
        return "nothing"

    whole = laid_out(Strategy())
    sharded = laid_out(Strategy(ep=2, zero=3))
    model, parallel = laid_out(Strategy(ep=4))
    to = Placement.of(MIXED, RANKS)
    found = {
        "whole": said(*whole, Placement.even(EXPERTS, 1)),
        "sharded": said(*sharded, Placement.even(EXPERTS, 2)),
        "unknown": said(model, parallel, to, layer="blocks.9.ffn"),
        "ranks": said(model, parallel, Placement.even(EXPERTS, 2)),
    }
    rows = optim.SGD(model.parameters())
    weight = model.get_parameter("blocks.0.ffn.experts.up_EDG")
    rows.state[weight]["row"] = torch.zeros(3)
    found["state"] = said(model, parallel, to, optimizer=rows)
    weight.grad = torch.zeros_like(weight)
    found["gradient"] = said(model, parallel, to)
    weight.grad = None
    # ranks that have not made the same steps
    unlike = optim.SGD(model.parameters(), momentum=0.9)
    if world.is_first:
        unlike.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    try:
        moved(model, parallel, unlike, {"blocks.0.ffn": to})
    except ConfigError as error:
        found["unlike"] = str(error)
    return found


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("whole", "every rank has all experts, none can move; nearest legal: strategy.ep=2"),
        ("sharded", "lie in shards (strategy.zero=3), and a shard is no expert; nearest legal: zero=0, or ep=4"),
        ("unknown", "'blocks.9.ffn' is no layer with experts; there are: blocks.0.ffn, blocks.1.ffn"),
        ("ranks", "8 experts on 2 ranks cannot follow 8 on 4"),
        ("state", "SGD keeps 'row' of shape [3] for up_EDG"),
        ("gradient", "up_EDG has a gradient: experts move between steps"),
        ("unlike", "ranks keep different things of their experts"),
    ],
)
def test_what_cannot_move_is_refused_on_every_rank(case: str, text: str, outcomes: tuple[Path, list[Outcome]]) -> None:
    for outcome in outcomes[1]:
        assert text in outcome["refused"][case]


# --- decisions ---


def counted(rows: list[int]) -> MoEStats:
    """What a rank routed."""
    zero, one = torch.zeros(len(rows), dtype=torch.int64), torch.tensor(sum(rows) // 2)
    return MoEStats(
        assigned_E=torch.tensor(rows), dropped_capacity_E=zero, dropped_policy_E=zero,
        num_routed=one, num_padding=one * 0, entropy_sum=torch.zeros(()), margin_sum=torch.zeros(()),
    )  # fmt: skip


def decided(world: World) -> dict[str, list[str]]:
    """The moves of one layer whose second host wants the first four experts, and the first host the others."""
    found = {}
    rows = [2, 2, 2, 2, 90, 70, 80, 60] if world.rank < HOST else [80, 60, 90, 70, 2, 2, 2, 2]
    link = Link(bytes_per_s=1e8)
    for name, router, hidden, every in (
        ("cheap", TopK(k=2), 4, 50),
        # an expert is as many bytes as the rows of some steps
        ("dear", TopK(k=2), 2048, 1),
        ("grouped", DeepSeekV3(k=2, groups=2, top_groups=1), 4, 50),
    ):
        torch.manual_seed(0)
        layer = MoE(6, hidden, EXPERTS, router=router)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel = apply(layer, Strategy(ep=4), world=world)
        optimizer = optim.SGD(layer.parameters())
        machine = Machine(flops_per_s=1e12, intra=replace(link, bytes_per_s=1e9), inter=link)
        rebalancer = Rebalancer(layer, parallel, Rebalancing(every=every, element_bytes=4, machine=machine))
        for _ in range(3):
            rebalancer.note([counted(rows)])
        assert rebalancer.is_due(every * 3)
        parallel.ledger.clear()
        before = placements_of(layer, parallel)[""]
        parallel, moves, sources = rebalancer.rebalanced(layer, parallel, optimizer)
        assert not rebalancer.is_due(every * 3), "nothing is counted yet"
        assert np.allclose(np.array(sources)[0, world.rank], rows)
        sent = parallel.ledger.sent("the layer", "forward", "moves")
        kind = [(size, to // HOST != world.rank // HOST) for to, (size, _) in sent.items()]
        own = [sum(size for size, far in kind if far is wanted) for wanted in (False, True)]
        total = world.total([float(size) for size in own])
        for move in moves:
            assert [move.intra_bytes, move.inter_bytes] == total, "the price that is shown is what the ledger counts"
            assert (move.before, move.after) == (before, placements_of(layer, parallel)[""])
        found[name] = [str(move) for move in moves]
    return found


SOURCES = {
    "two groups": (Strategy(ep=2), [(0, 2), (1, 3)], 0.5),  # ranks that stand for each of the group, and their share
    "two slices": (Strategy(ep=2, etp=2), [(0, 1), (2, 3)], 1.0),
}


def sources(world: World) -> dict[str, Any]:
    """Rows by rank of the expert group, where groups are two or slices are neighbours."""
    found = {}
    for name, (strategy, _, _) in SOURCES.items():
        layer = MoE(6, 4, EXPERTS)
        parallel = apply(layer, strategy, world=replace(world, local_size=RANKS))
        link = Link(bytes_per_s=1e9)
        machine = Machine(flops_per_s=1e9, intra=link, inter=link)
        rebalancer = Rebalancer(layer, parallel, Rebalancing(every=1, element_bytes=4, machine=machine))
        rebalancer.note([counted(own_rows(world.rank))])
        _, moves, rows = rebalancer.rebalanced(layer, parallel, optim.SGD(layer.parameters()))
        found[name] = (rows[0], [move.tokens for move in moves])
    return found


def own_rows(rank: int) -> list[int]:
    return [(rank + 1) * (100 if expert == rank else 10) for expert in range(EXPERTS)]


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_counted_for_a_mean_group_and_for_all_slices(name: str, outcomes: tuple[Path, list[Outcome]]) -> None:
    _, members, share = SOURCES[name]
    want = [[share * sum(column) for column in zip(*map(own_rows, ranks), strict=True)] for ranks in members]
    for outcome in outcomes[1]:
        rows, tokens = outcome["sources"][name]
        assert np.allclose(rows, want)
        # bytes a token count one slice's rows and tokens
        assert tokens == [pytest.approx(np.sum(want) / 2 / (2 if name == "two slices" else 1))]


def test_experts_move_where_it_pays_and_groups_stay_together(outcomes: tuple[Path, list[Outcome]]) -> None:
    _, found = outcomes
    assert all(outcome["decided"] == found[0]["decided"] for outcome in found)
    said = found[0]["decided"]
    (line,) = said["cheap"]
    assert line.startswith("the layer: 8 of 8 experts move; fullest rank ")
    assert "between hosts 187 -> 5 bytes a token" in line
    # 2 matrices of up and one of down, 6 by 4 in float32; SGD keeps nothing
    assert f"{8 * 3 * 6 * 4 * 4:,} bytes are sent between hosts and 0 inside" in line
    assert said["dear"] == []
    # all of a group moves, or none of it
    assert all("8 of 8 experts move" in line for line in said["grouped"])


# --- runs ---


def moving_recipe(folder: Path, strategy: Strategy, every: int) -> Recipe:
    """More experts than ranks, unevenly loaded, on a machine where that is dear."""
    recipe = recipe_of(folder, strategy)
    moe = MoEConfig(num_experts=EXPERTS, hidden=16, router=TopK(k=2, init_std=0.5), losses=(), bias=True)
    on = {"rebalance_every": every, "rebalance_on": str(folder / "slow.toml"), "rebalance_spare": 1} if every else {}
    loop = replace(recipe.loop, checkpoint="sharded", **on)
    return replace(recipe, model=replace(recipe.model, moe=moe), loop=loop)


def runs(world: World, folder: Path) -> dict[str, Any]:
    """One run whose experts move, the same stopped and resumed, and one in which they stay."""
    found: dict[str, Any] = {}
    for name, every, stops in (("moving", EVERY, ()), ("resumed", EVERY, (STOPPED_AT,)), ("staying", 0, ())):
        recipe = moving_recipe(folder, Strategy(ep=4, alltoall="node_dedup"), every)
        dataset = dataset_of(folder, recipe)
        for number, until in enumerate([*stops, STEPS]):
            trainer = Trainer(recipe, dataset, folder / name, resume=number > 0, world=world)
            if number:
                assert_restored(trainer, folder / name)
            trainer.train(StopRequest(), pause_at=until / STEPS)
            assert trainer.save() is not None, trainer.unsaved
            trainer.close()
        whole = trainer.parallel.shards.whole(trainer.model.state_dict())
        found[name] = {
            "state": whole if world.is_first else {},
            "placements": placements_of(trainer.model, trainer.parallel),
        }
    return found


def test_a_run_moves_experts_says_why_and_goes_on_as_if_it_never_stopped(outcomes: tuple[Path, list[Outcome]]) -> None:
    folder, found = outcomes
    moving, resumed, staying = (found[0]["runs"][name] for name in ("moving", "resumed", "staying"))
    assert moving["placements"] == resumed["placements"]
    assert any(placement != Placement.even(EXPERTS, RANKS) for placement in moving["placements"].values())
    for name, value in staying["state"].items():
        assert torch.equal(moving["state"][name], resumed["state"][name]), name
        assert worst(moving["state"][name], value) <= 1e-4, name
    lines = [json.loads(line) for line in (folder / "moving" / "metrics.jsonl").read_text().splitlines()]
    said = [line for line in lines if line["kind"] == "event"]
    assert said
    for line in said:
        assert line["step"] % EVERY == 0
        assert line["text"].startswith("placement: blocks.")
    first, second = ([(e["step"], e["text"]) for e in lines_of(folder / name)] for name in ("moving", "resumed"))
    assert first == second


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "event" and "placement" in line["text"]]


def test_where_rows_came_from_is_recorded(outcomes: tuple[Path, list[Outcome]]) -> None:
    run = outcomes[0] / "moving"
    sources, trace = read_sources(run), read_trace(run)
    assert list(sources) == list(trace.layers)
    for rows_RE, counts in zip(sources.values(), trace.counts, strict=True):
        assert rows_RE.shape == (RANKS, EXPERTS)
        assert np.allclose(rows_RE.sum(axis=0), counts[-EVERY:].mean(axis=0))


def test_what_was_saved_after_a_move_loads_anywhere(outcomes: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    folder, found = outcomes
    loaded = checkpoint.load(folder / "moving")
    for name, value in found[0]["runs"]["moving"]["state"].items():
        assert torch.equal(loaded.files["model"][name], value), name
    recipe = moving_recipe(folder, Strategy(), 0)
    trainer = Trainer(recipe, dataset_of(folder, recipe), folder / "moving", resume=True)
    assert_restored(trainer, folder / "moving")
    trainer.close()
