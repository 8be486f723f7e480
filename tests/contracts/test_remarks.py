"""Groups of a router or a loss that are not the devices or nodes they stand for."""

import pytest

from turnout.contracts import Loss, RouterConfig
from turnout.losses import CommunicationBalance, DeviceBalance, LoadBalance, Locality
from turnout.placement import Placement, Site
from turnout.routers import DeepSeekV3, DeviceLimited, TopK


def site_of(ranks: int, node_size: int) -> Site:
    return Site(placement=Placement.even(8, ranks), node_size=node_size, rank=0)


LIMITED = DeviceLimited(k=2, groups=2, top_groups=1)
NODES = DeepSeekV3(k=2, groups=2, top_groups=1)


@pytest.mark.parametrize(
    ("part", "site", "text"),
    [
        (Locality(), site_of(4, 4), "the locality loss is 0: all 8 experts of a layer are on one node"),
        (Locality(), Site.alone(8), "the locality loss is 0: all 8 experts"),
        (Locality(), site_of(4, 2), ""),
        (Locality(local=(0,)), Site.alone(8), ""),
        (LIMITED, site_of(2, 2), ""),
        (LIMITED, Site.alone(8), ""),
        (
            LIMITED,
            site_of(4, 4),
            (
                "router.groups=2: the experts of one group lie on 2 of the 4 ranks of this layout, so top_groups=1 "
                "lets a token reach 2 ranks; groups=4 are its ranks"
            ),
        ),
        (DeviceLimited(k=2, groups=2, top_groups=2), site_of(4, 4), ""),
        (DeviceLimited(k=2, groups=8, top_groups=3), site_of(4, 4), ""),
        (NODES, site_of(4, 2), ""),
        (NODES, site_of(4, 4), ""),
        (NODES, site_of(4, 1), "router.groups=2: the experts of one group lie on 2 of the 4 nodes of this layout"),
        (TopK(), site_of(4, 1), ""),
        (LoadBalance(), site_of(4, 1), ""),
        (DeviceBalance(groups=4), site_of(4, 4), ""),
        (DeviceBalance(groups=8), site_of(4, 4), ""),
        (DeviceBalance(groups=2), site_of(4, 2), ""),
        (DeviceBalance(groups=2), Site.alone(8), ""),
        (DeviceBalance(groups=2), site_of(4, 4), "device_balance.groups=2: the experts of one device lie on 2 ranks"),
        (CommunicationBalance(groups=4), site_of(4, 2), ""),
        (CommunicationBalance(groups=2), site_of(4, 2), ""),
        (CommunicationBalance(groups=2), Site.alone(8), ""),
        (
            CommunicationBalance(groups=8),
            site_of(4, 2),
            (
                "communication_balance.groups=8 are not the devices of this layout, so that it counts other tokens "
                "than are sent; groups=4 are its ranks"
            ),
        ),
        (CommunicationBalance(groups=2), site_of(4, 4), "communication_balance.groups=2 are not the devices"),
    ],
)
def test_groups_that_are_not_what_they_stand_for_are_named(part: Loss | RouterConfig, site: Site, text: str) -> None:
    remark = part.remark(site)
    assert remark.startswith(text)
    assert bool(remark) == bool(text)
