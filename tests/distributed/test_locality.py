"""Each rank's locality loss knows the experts on its own host: two hosts of two ranks, by gloo."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.ranks import Outcome, spawn
from turnout import MoE, Strategy, total_loss
from turnout.comm import World
from turnout.comm.world import current_world
from turnout.errors import ConfigError
from turnout.losses import LoadBalance, Locality
from turnout.parallel import apply, reduce_gradients
from turnout.routers import TopK

RANKS, HOST, DIM, EXPERTS = 4, 2, 6, 8
EPSILON, COEFFICIENT = 0.1, 0.7
TOKENS = (5, 9, 0, 6)  # of each rank
EVERY = tuple(range(EXPERTS))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A strategy, the ranks of a host, and the experts that each rank then has near."""

    strategy: Strategy
    host: int
    near: tuple[tuple[int, ...], ...]


HALVES = (EVERY[:4], EVERY[:4], EVERY[4:], EVERY[4:])
LAYOUTS = {
    "experts over both hosts": Layout(strategy=Strategy(ep=4), host=HOST, near=HALVES),
    "by another program": Layout(strategy=Strategy(ep=4, alltoall="node_dedup", overlap=2), host=HOST, near=HALVES),
    "one host": Layout(strategy=Strategy(ep=4), host=RANKS, near=(EVERY,) * 4),
    "four hosts": Layout(strategy=Strategy(ep=4), host=1, near=tuple(EVERY[at : at + 2] for at in (0, 2, 4, 6))),
    "all experts on each host": Layout(strategy=Strategy(ep=2), host=HOST, near=(EVERY,) * 4),
    "all experts on each rank": Layout(strategy=Strategy(), host=HOST, near=(EVERY,) * 4),
    "slices within a host": Layout(strategy=Strategy(ep=2, etp=2), host=HOST, near=HALVES),
    "tokens shared by two": Layout(strategy=Strategy(ep=2, tp=2), host=HOST, near=HALVES),
}


def layer_of() -> MoE:
    """The whole layer, the same for everybody; beside the locality loss one that every rank has alike."""
    torch.manual_seed(0)
    losses = (LoadBalance(coefficient=0.2), Locality(coefficient=COEFFICIENT, epsilon=EPSILON))
    return MoE(DIM, 4, EXPERTS, router=TopK(k=2, init_std=0.8), losses=losses).double()


def tokens_of(rank: int) -> Tensor:
    return torch.randn(TOKENS[rank], DIM, generator=torch.Generator().manual_seed(9 + rank), dtype=torch.float64)


def by_hand(layer: MoE, x_TD: Tensor, near: tuple[int, ...]) -> Tensor:
    """-sum D_c ln(D_l / D_c), expert by expert; differentiable."""
    value = x_TD.new_zeros(())
    if len(near) == EXPERTS or len(x_TD) == 0:
        return value
    shares_E = layer.router(x_TD).scores_RE.mean(dim=0)
    for expert, share in enumerate(shares_E):
        aim = (1 - EPSILON) / len(near) if expert in near else EPSILON / (EXPERTS - len(near))
        value = value - share * (math.log(aim) - share.log())
    return value


def work(world: World, folder: Path) -> None:
    found: Outcome = {}
    for name, layout in LAYOUTS.items():
        layer = layer_of()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            parallel = apply(layer, layout.strategy, world=replace(world, local_size=layout.host))
        rank = parallel.text_place[0] * layout.strategy.tp
        out = layer(tokens_of(rank))
        (0 * out.y.sum() + total_loss(out.losses[-1:])).backward()
        reduce_gradients(layer, parallel)
        grad = layer.get_parameter("router.score.weight_ED").grad
        warned = [str(each.message) for each in said if "locality" in str(each.message)]
        found[name] = {"losses": layer.losses, "value": out.losses[-1].value.detach(), "grad": grad, "warned": warned}
    found["simulated"] = refused(world)
    found["torchrun"] = under_torchrun(world)
    torch.save(found, folder / f"rank-{world.rank}.pt")


def refused(world: World) -> str:
    """A node that was typed in would be that of every rank."""
    layer = MoE(DIM, 4, EXPERTS, losses=(Locality(local=(0, 1)),))
    try:
        apply(layer, Strategy(ep=4), world=replace(world, local_size=HOST))
    except ConfigError as error:
        assert layer.experts.get_parameter("up_EDG").shape[0] == EXPERTS, "nothing is cut before all is settled"
        return str(error)
    return "nothing"


def under_torchrun(world: World) -> tuple[Outcome, str]:
    """`apply` without a world, where torchrun started two ranks on each of two hosts; then ranks in another order."""
    own = {"RANK": world.rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": HOST, "LOCAL_RANK": world.rank % HOST}
    layer = layer_of()
    os.environ |= {name: str(value) for name, value in own.items()}
    apply(layer, Strategy(ep=4))
    dist.barrier()
    os.environ["LOCAL_RANK"] = str(world.rank // HOST)
    try:
        current_world()
    except ConfigError as error:
        said = str(error)
    else:
        said = "nothing"
    for name in own:
        del os.environ[name]
    assert current_world() == World(rank=world.rank, size=RANKS, local_size=RANKS)
    return {"losses": layer.losses}, said


@pytest.fixture(scope="session")
def outcomes(once: Callable[[str, Callable[[Path], None]], Path]) -> list[Outcome]:
    folder = once("locality", lambda folder: spawn(work, RANKS, folder))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_knows_which_experts_are_on_its_host(name: str, outcomes: list[Outcome]) -> None:
    for near, got in zip(LAYOUTS[name].near, outcomes, strict=True):
        balance, locality = layer_of().config.losses
        assert isinstance(locality, Locality)
        assert got[name]["losses"] == (balance, replace(locality, local=near))


@pytest.mark.parametrize("name", LAYOUTS)
def test_value_and_gradient_are_those_by_hand(name: str, outcomes: list[Outcome]) -> None:
    layout, layer = LAYOUTS[name], layer_of()
    tp = layout.strategy.tp
    values = [by_hand(layer, tokens_of(rank // tp * tp), near) for rank, near in enumerate(layout.near)]
    mean = torch.stack(values).mean()
    if mean.requires_grad:
        (COEFFICIENT * mean).backward()
    grad = layer.get_parameter("router.score.weight_ED").grad
    want = torch.zeros(EXPERTS, DIM).double() if grad is None else grad
    assert bool(want.any()) == (layout.near != (EVERY,) * 4)
    for got, value in zip(outcomes, values, strict=True):
        assert abs(got[name]["value"].item() - value.item()) < 1e-14
        torch.testing.assert_close(got[name]["grad"], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", LAYOUTS)
def test_where_all_experts_are_near_the_first_rank_says_that_the_loss_is_zero(
    name: str, outcomes: list[Outcome]
) -> None:
    said = [got[name]["warned"] for got in outcomes]
    is_zero = LAYOUTS[name].near == (EVERY,) * 4
    assert [len(lines) for lines in said] == [int(is_zero), 0, 0, 0]


def test_a_node_that_was_typed_in_is_refused_on_several_ranks(outcomes: list[Outcome]) -> None:
    for got in outcomes:
        assert (
            "locality.local=[0, 1] simulates a node in one process; on several ranks the layout says"
            in got["simulated"]
        )


def test_torchrun_says_how_many_ranks_a_host_has(outcomes: list[Outcome]) -> None:
    for near, got in zip(HALVES, outcomes, strict=True):
        assert got["torchrun"][0]["losses"][1].local == near
    # of LOCAL_RANK 0, 0, 1, 1 the second and the third are where no rank of theirs should be
    said = [got["torchrun"][1] for got in outcomes]
    assert [text == "nothing" for text in said] == [True, False, False, True]
    assert "RANK=1 is LOCAL_RANK=0 of LOCAL_WORLD_SIZE=2 on its node, WORLD_SIZE=4: ranks must be numbered" in said[1]
