"""Where a rank stands among the experts of a layer, and what a layout says of a locality loss."""

import re
import warnings

import pytest
from torch import nn

from turnout import MoE, Strategy
from turnout.errors import ConfigError
from turnout.losses import Locality
from turnout.parallel import apply
from turnout.placement import Placement, Site


def site_of(ranks: int, node_size: int, num_experts: int = 8, rank: int = 0) -> Site:
    return Site(placement=Placement.even(num_experts, ranks), node_size=node_size, rank=rank)


def test_the_experts_of_all_ranks_of_a_node_are_near() -> None:
    uneven = Placement((0, 3, 4, 6, 7))
    near = [Site(placement=uneven, node_size=2, rank=rank).near for rank in range(4)]
    assert near == [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6), (4, 5, 6)]
    assert [Site(placement=uneven, node_size=1, rank=rank).near for rank in range(4)] == [
        (0, 1, 2),
        (3,),
        (4, 5),
        (6,),
    ]
    assert Site(placement=uneven, node_size=4, rank=2).near == tuple(range(7))
    assert Site.alone(3).near == (0, 1, 2)


@pytest.mark.parametrize(
    ("groups", "ranks_each", "spread"), [(8, 1, 1), (4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2), (4, 2, 1)]
)
def test_a_group_is_spread_over_so_many_ranks_or_nodes(groups: int, ranks_each: int, spread: int) -> None:
    assert site_of(4, 2).spread(groups, ranks_each) == spread


def test_runs_of_neighbours_may_end_in_the_middle_of_an_uneven_rank() -> None:
    site = Site(placement=Placement((0, 3, 4, 8)), node_size=1, rank=0)
    assert [site.spread(groups) for groups in (8, 4, 2, 1)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: site_of(4, 3), "site.node_size=3 must divide the 4 ranks of the placement"),
        (lambda: site_of(4, 0), "site.node_size=0 must divide the 4 ranks"),
        (lambda: site_of(4, 2, rank=4), "site.rank=4 must be in 0..3"),
        (lambda: site_of(4, 2).spread(3), "groups=3 must divide num_experts=8"),
    ],
)
def test_a_site_that_cannot_be_is_refused(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=re.escape(text)):
        make()


def test_in_one_process_a_layout_warns_once_and_leaves_a_simulated_node_alone() -> None:
    layers = [MoE(4, 4, 4, losses=(Locality(), Locality(local=(1,)))) for _ in range(2)]
    with pytest.warns(UserWarning, match="the locality loss is 0: all 4 experts") as said:
        apply(nn.ModuleList(layers), Strategy())
    assert len(said) == 1
    assert layers[0].losses == layers[0].config.losses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(MoE(4, 4, 4, losses=(Locality(local=(1,)),)), Strategy())
