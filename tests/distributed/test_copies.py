"""Experts with copies on several ranks: alike to the bit, priced to the byte, and given to those that need them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, optim

from tests.distributed.cases import TrainCase, decoder, texts, worst
from tests.distributed.ranks import Outcome, spawn
from tests.distributed.runs import STEPS, assert_restored, dataset_of, prepare_text
from tests.distributed.test_moves import EVERY, HOST, RANKS, SLOW, STOPPED_AT, counted, moving_recipe
from turnout import MoE, Strategy
from turnout.balance import Machine, twin_bytes
from turnout.comm import World
from turnout.errors import ConfigError, TransportError
from turnout.experts import FFNExperts
from turnout.models import Decoder
from turnout.parallel import Parallel, apply, check_replicas, check_shards, reduce_gradients
from turnout.parallel.moves import moved, placements_of
from turnout.parallel.rebalancer import Rebalancer, Rebalancing
from turnout.placement import Placement
from turnout.routers import DeepSeekV3
from turnout.topology import Link
from turnout.train import checkpoint
from turnout.train.banner import banner
from turnout.train.device import autocast_for
from turnout.train.estimate import memory_per_rank
from turnout.train.loop import Trainer
from turnout.train.optimizer import build_optimizer
from turnout.train.recipe import OptimizerConfig, Recipe, check_ranks
from turnout.train.recipes import load_recipe
from turnout.train.signals import StopRequest
from turnout.train.step import train_step

EXPERTS, COPIES = 8, 4
PACKS = ((0, 1, 6), (2, 0, 3), (4, 5, 0), (6, 7, 0))


@pytest.fixture(scope="module")
def outcomes(once: Any) -> tuple[Path, list[Outcome]]:
    """The folder of four ranks on two hosts, and what each wrote down."""

    def make(folder: Path) -> None:
        prepare_text(folder)
        (folder / "slow.toml").write_text(SLOW)
        spawn(work, RANKS, folder)

    folder = once("copies", make)
    return folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def work(world: World, folder: Path) -> None:
    on_hosts = replace(world, local_size=HOST)
    found: Outcome = {
        "steps": steps(on_hosts),
        "drift": drift(on_hosts),
        "bytes": summed_bytes(on_hosts),
        "decided": decided(on_hosts),
        "inference": inference(on_hosts),
        "runs": runs(on_hosts, folder),
    }
    torch.save(found, folder / f"rank-{world.rank}.pt")


# --- to the bit ---


def stepped(world: World, strategy: Strategy, *, recipes_optimizer: bool) -> tuple[Decoder, Parallel]:
    """Six clipped steps in float32; biases of experts fill no register of a processor."""
    case = replace(TrainCase(dtype=torch.float32, local=HOST, bias=True, adam=True), ep=strategy.ep)
    model = decoder(case)
    parallel = apply(model, strategy, world=world)
    to = dict.fromkeys(placements_of(model, parallel), Placement.holding(PACKS))
    optimizer: optim.Optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if recipes_optimizer:
        optimizer = build_optimizer(model, OptimizerConfig(lr=0.01), has_copies=True)
        for group in optimizer.param_groups:
            assert not group["fused"]
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    for step in range(6):
        if step == 3:
            parallel = moved(model, parallel, optimizer, to)
        mine = texts(case, step)[world.rank]
        train_step(model, model.loss, optimizer, mine, max_norm=0.1, autocast=autocast, parallel=parallel)
    return model, parallel


def steps(world: World) -> dict[str, dict[str, Tensor]]:
    """Every expert that this rank holds, after steps, by its name and number."""
    found = {}
    for name in ("adamw", "sgd"):
        strategy = Strategy(ep=4, expert_copies=COPIES)
        model, parallel = stepped(world, strategy, recipes_optimizer=name == "adamw")
        check_replicas(model, parallel)
        found[name] = {
            f"{weight} {parallel.shards.expert_at(weight, row)}": value
            for weight in parallel.shards.cuts
            for row, value in enumerate(model.get_parameter(weight).detach())
        }
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_copies_have_the_same_bits_after_clipped_steps(name: str, outcomes: tuple[Path, list[Outcome]]) -> None:
    held = [outcome["steps"][name] for outcome in outcomes[1]]
    shared = [key for key in held[0] if all(key in own for own in held[1:])]
    assert {key.rpartition(" ")[2] for key in shared} == {"0"}, "expert 0 lies on all four ranks, the others do not"
    for key in {key for own in held for key in own}:
        copies = [own[key] for own in held if key in own]
        assert all(torch.equal(copies[0], other) for other in copies[1:]), key


def drift(world: World) -> str:
    """What is said where one copy of one expert is another."""
    layer = MoE(6, 4, EXPERTS)
    parallel = apply(layer, Strategy(ep=4, expert_copies=COPIES), world=world)
    parallel = moved(layer, parallel, None, {"": Placement.holding(PACKS)})
    check_replicas(layer, parallel)
    assert isinstance(layer.experts, FFNExperts)
    with torch.no_grad():
        # expert 6 of rank 3
        layer.experts.down_EFD[0].add_(float(world.rank == 3))
    try:
        check_replicas(layer, parallel)
    except TransportError as error:
        return str(error)
    return "nothing"


def test_a_copy_that_drifts_away_is_named(outcomes: tuple[Path, list[Outcome]]) -> None:
    for rank, outcome in enumerate(outcomes[1]):
        assert f"rank {rank}: expert 6 of experts.down_EFD is not the same on all ranks" in outcome["drift"]


# --- to the byte ---


def summed_bytes(world: World) -> dict[str, Any]:
    """Bytes of gradients of copies that this rank sent to each, as predicted and as counted; with slices too."""
    found = {}
    for name, strategy, packs in (
        ("whole", Strategy(ep=4, expert_copies=COPIES), PACKS),
        ("sliced", Strategy(ep=2, etp=2, expert_copies=2), ((0, 1, 2, 3, 7), (4, 5, 6, 7, 0))),
    ):
        layer = MoE(6, 4, EXPERTS, bias=True)
        parallel = apply(layer, strategy, world=world)
        parallel = moved(layer, parallel, None, {"": Placement.holding(packs)})
        layer(torch.randn(9, 6)).y.sum().backward()
        parallel.ledger.clear()
        reduce_gradients(layer, parallel)
        slices = strategy.etp
        # gate and up, down, their bias, and on the first slice that of down
        each = [4 * (3 * 6 * 4 + 2 * 4) // slices + (4 * 6 if at == 0 else 0) for at in range(slices)]
        pairs = twin_bytes(Placement.holding(packs), each)
        sent = parallel.ledger.sent("the layer", "backward", "twins")
        others = [rank for rank in range(RANKS) if rank != world.rank]
        found[name] = {rank: [pairs.get((world.rank, rank), 0), 2] for rank in others}, sent
    return found


@pytest.mark.parametrize("name", ["whole", "sliced"])
def test_gradients_of_copies_are_as_many_bytes_as_predicted(name: str, outcomes: tuple[Path, list[Outcome]]) -> None:
    for outcome in outcomes[1]:
        want, got = outcome["bytes"][name]
        assert got == want
    assert sum(size for size, _ in outcomes[1][0]["bytes"][name][0].values()) > 0


# --- decisions ---


def decided(world: World) -> dict[str, Any]:
    """The placement after one question: a hot expert among cool ones, where rows or gradients are dear, or groups."""
    found = {}
    rows = [5, 5, 5, 800, 5, 5, 5, 5]
    grouped = DeepSeekV3(k=2, groups=2, top_groups=1)
    for name, router, hidden, flops in (
        ("rows", None, 4, 1e6),
        ("gradients", None, 4096, 1e12),
        ("groups", grouped, 4, 1e6),
    ):
        layer = MoE(6, hidden, EXPERTS, router=router)
        parallel = apply(layer, Strategy(ep=4, expert_copies=COPIES), world=world)
        # nothing to begin with
        parallel = moved(layer, parallel, None, {"": Placement.even(EXPERTS, RANKS)})
        link = Link(bytes_per_s=1e7)
        config = Rebalancing(every=100, element_bytes=4, machine=Machine(flops_per_s=flops, intra=link, inter=link))
        rebalancer = Rebalancer(layer, parallel, config)
        rebalancer.note([counted(rows)])
        parallel, moves, _ = rebalancer.rebalanced(layer, parallel, optim.SGD(layer.parameters()))
        found[name] = placements_of(layer, parallel)[""], [str(move) for move in moves]
    return found


def test_the_hot_expert_gets_copies_where_that_pays(outcomes: tuple[Path, list[Outcome]]) -> None:
    said = outcomes[1][0]["decided"]
    assert all(outcome["decided"] == said for outcome in outcomes[1])
    placement, (line,) = said["rows"]
    assert len(placement.ranks_of[3]) == RANKS
    # 800 of 835 rows for one rank of four, and then a fourth of them for each
    assert "3 have copies; fullest rank 3.86 -> 1.01 of the mean" in line
    assert not said["gradients"][0].has_copies, "rows are cheap, and gradients of copies would travel in every step"
    grouped, _ = said["groups"]
    assert grouped.has_copies
    nodes = [{rank // HOST for rank in ranks} for ranks in grouped.ranks_of]
    assert all(len(set().union(*nodes[group : group + 4])) == 1 for group in (0, 4)), "a group stays on its host"


# --- inference ---


def inference(world: World) -> float:
    """The largest difference from one process, of a layer that is asked and not trained."""
    torch.manual_seed(0)
    layer, alone = MoE(6, 4, EXPERTS).double(), MoE(6, 4, EXPERTS).double()
    alone.load_state_dict(layer.state_dict())
    parallel = apply(layer.eval(), Strategy(ep=4, expert_copies=COPIES, alltoall="node_dedup"), world=world)
    difference = 0.0
    with torch.no_grad():
        for number in range(1, 4):
            x_TD = torch.randn(number, 6, generator=torch.Generator().manual_seed(world.rank)).double()
            difference = max(difference, worst(layer(x_TD).y, alone.eval()(x_TD).y))
            parallel = moved(layer, parallel, None, {"": Placement.holding(PACKS[number:] + PACKS[:number])})
    return difference


def test_inference_equals_one_process(outcomes: tuple[Path, list[Outcome]]) -> None:
    assert max(outcome["inference"] for outcome in outcomes[1]) <= 1e-10


# --- runs ---


def copying_recipe(folder: Path) -> Recipe:
    recipe = moving_recipe(folder, Strategy(ep=4, alltoall="node_dedup"), EVERY)
    strategy = replace(recipe.strategy, expert_copies=COPIES)
    return replace(recipe, strategy=strategy, loop=replace(recipe.loop, rebalance_spare=0))


def runs(world: World, folder: Path) -> dict[str, Any]:
    """A run whose experts get copies, the same stopped and resumed, and one without any."""
    found: dict[str, Any] = {}
    staying = moving_recipe(folder, Strategy(ep=4, alltoall="node_dedup"), 0)
    for name, recipe, stops in (
        ("copying", copying_recipe(folder), ()),
        ("resumed", copying_recipe(folder), (STOPPED_AT,)),
        ("staying", staying, ()),
    ):
        dataset = dataset_of(folder, recipe)
        for number, until in enumerate([*stops, STEPS]):
            trainer = Trainer(recipe, dataset, folder / name, resume=number > 0, world=world)
            if number:
                assert_restored(trainer, folder / name)
            trainer.train(StopRequest(), pause_at=until / STEPS)
            assert trainer.save() is not None, trainer.unsaved
            trainer.close()
            whole = trainer.parallel.shards.whole(trainer.model.state_dict())
            placements = placements_of(trainer.model, trainer.parallel)
            found[name] = {"state": whole if world.is_first else {}, "placements": placements}
    return found


def test_a_run_gives_copies_and_goes_on_as_if_it_never_stopped(outcomes: tuple[Path, list[Outcome]]) -> None:
    folder, found = outcomes
    copying, resumed, staying = (found[0]["runs"][name] for name in ("copying", "resumed", "staying"))
    assert copying["placements"] == resumed["placements"]
    assert all(placement.num_slots <= EXPERTS + COPIES for placement in copying["placements"].values())
    for name, value in staying["state"].items():
        assert torch.equal(copying["state"][name], resumed["state"][name]), name
        assert worst(copying["state"][name], value) <= 1e-4, name
    said = [json.loads(line) for line in (folder / "copying" / "metrics.jsonl").read_text().splitlines()]
    events = [line["text"] for line in said if line["kind"] == "event"]
    assert any(event.startswith("placement: blocks.") for event in events)


def test_what_was_saved_with_copies_loads_in_one_process(outcomes: tuple[Path, list[Outcome]]) -> None:
    folder, found = outcomes
    loaded = checkpoint.load(folder / "copying")
    for name, value in found[0]["runs"]["copying"]["state"].items():
        assert torch.equal(loaded.files["model"][name], value), name
        assert math.prod(value.shape), name
    recipe = moving_recipe(folder, Strategy(), 0)
    trainer = Trainer(recipe, dataset_of(folder, recipe), folder / "copying", resume=True)
    assert_restored(trainer, folder / "copying")
    trainer.close()


# --- what is said before ---


def small(copies: int, **loop: Any) -> Recipe:
    """The smallest recipe with so many copies."""
    return load_recipe(
        "smoke",
        [
            "strategy.ep=2",
            f"strategy.expert_copies={copies}",
            *(f"loop.{name}={value}" for name, value in ({"rebalance_every": 7} | loop).items()),
        ],
    )


def test_the_banner_says_whose_copies_there_are_and_what_they_cost() -> None:
    world = World(rank=0, size=2, local_size=2)
    recipe, without = small(2), small(0)
    moe = recipe.model.moe
    assert moe is not None
    (fact,) = (fact for fact in banner(recipe, world) if fact.name == "copies")
    # one more on each rank, in every layer: weights, gradients and two moments in float32
    layers = len(recipe.model.moe_layers())
    cost = 16 * layers * 3 * recipe.model.dim * moe.hidden
    assert fact.value == {"number": 2, "experts": [0, 1], "bytes_per_rank": cost}
    assert f"from step 7 on of the most loaded; weights, gradients and moments take {cost:,} bytes more" in fact.text
    assert all(fact.name != "copies" for fact in banner(without, world))
    more = memory_per_rank(recipe, 2) - memory_per_rank(without, 2)
    # gradients grow while activations shrink, so their peak may hide them
    assert 0.75 * cost <= more <= cost


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: small(2, rebalance_every=0), "set loop.rebalance_every=100 too, or expert_copies=0"),
        (lambda: small(2, rebalance_spare=1), "loop.rebalance_spare=1 with strategy.expert_copies=2"),
        (lambda: check_ranks(small(99), 2), "strategy.expert_copies=99 must not exceed"),
        (
            lambda: check_shards(Strategy(ep=2, expert_copies=2, zero=3).check(4, num_experts=4), has_experts=True),
            "strategy.expert_copies=2 with zero=3 would lie in shards",
        ),
    ],
)
def test_copies_that_cannot_be_had_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        make()
