"""Links, clusters and meshes: times follow the law, ranks have places, what cannot be is refused with the nearest."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.topology import Cluster, Device, Link, Mesh, PeakFlops, mesh_of

DEVICE = Device(
    name="toy",
    generation="ampere",
    peak_flops_per_s=PeakFlops(bf16=1e12),
    memory_bytes=1e9,
    memory_bytes_per_s=1e11,
)
CLUSTER = Cluster(
    name="toy", device=DEVICE, devices_per_node=8, intra=Link(bytes_per_s=1e11), inter=Link(bytes_per_s=1e10)
)


def test_a_link_takes_latency_per_message_and_half_bandwidth_at_half_bytes() -> None:
    link = Link(bytes_per_s=100.0, latency_s=2.0)
    assert link.time_s(300.0, 4) == 2.0 * 4 + 300.0 / 100.0
    assert link.half_bytes == 200.0
    for size in (1.0, 200.0, 1e6):
        assert size / link.time_s(size, 1) == pytest.approx(100.0 * size / (size + 200.0))


@given(sent=st.floats(0, 1e12), messages=st.integers(0, 10_000), slow=st.floats(1e6, 1e12), faster=st.floats(1, 1e3))
def test_more_bandwidth_never_takes_longer(sent: float, messages: int, slow: float, faster: float) -> None:
    link = Link(bytes_per_s=slow, latency_s=1e-6)
    assert replace(link, bytes_per_s=slow * faster).time_s(sent, messages) <= link.time_s(sent, messages)


@given(nodes=st.integers(1, 50), local=st.integers(1, 50), data=st.data())
def test_ranks_and_places_are_each_others_inverse(nodes: int, local: int, data: st.DataObject) -> None:
    mesh = Mesh(nodes=nodes, local=local)
    rank = data.draw(st.integers(0, mesh.size - 1))
    assert mesh.rank(*mesh.place(rank)) == rank


@pytest.mark.parametrize(("world", "want"), [(3, (1, 3)), (8, (1, 8)), (24, (3, 8)), (100_000, (12_500, 8))])
def test_a_world_fills_whole_nodes_or_a_part_of_one(world: int, want: tuple[int, int]) -> None:
    mesh = mesh_of(world, 8)
    assert (mesh.nodes, mesh.local) == want


@pytest.mark.parametrize(("world", "near"), [(20, 16), (21, 24), (9, 8)])
def test_an_uneven_last_node_is_refused_with_the_nearest_world(world: int, near: int) -> None:
    with pytest.raises(ConfigError, match=f"world={world} leaves .* nearest legal: {near}"):
        mesh_of(world, 8)


@pytest.mark.parametrize("place", [(2, 0), (0, 4), (-1, 0)])
def test_places_off_the_mesh_are_refused(place: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"must be below \(2, 4\)"):
        Mesh(nodes=2, local=4).rank(*place)


def test_ranks_off_the_mesh_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank=8 must be in 0..7"):
        Mesh(nodes=2, local=4).place(8)


def test_links_above_the_leaf_are_slower_by_the_oversubscription() -> None:
    cluster = replace(CLUSTER, oversubscription=4.0, nodes_per_leaf=16)
    assert cluster.inter_over(16) == CLUSTER.inter
    assert cluster.inter_over(17).bytes_per_s == CLUSTER.inter.bytes_per_s / 4
    assert CLUSTER.inter_over(1000) == CLUSTER.inter


def test_on_rails_what_leaves_its_rail_crosses_the_spine_however_near() -> None:
    rails = replace(CLUSTER, oversubscription=4.0, nodes_per_leaf=16)
    assert rails.inter_over(2, 7 / 8).bytes_per_s == CLUSTER.inter.bytes_per_s / 3.5
    # the card is the limit where little crosses
    assert rails.inter_over(2, 1 / 8) == CLUSTER.inter
    assert rails.inter_over(17, 0.0).bytes_per_s == rails.inter_over(17, 1.0).bytes_per_s
    assert replace(rails, rails=False).inter_over(2, 7 / 8) == CLUSTER.inter
    assert replace(rails, oversubscription=1.0).inter_over(2, 7 / 8) == CLUSTER.inter


def test_an_all_to_all_on_a_torus_is_limited_by_its_bisection() -> None:
    torus = replace(CLUSTER, devices_per_node=4096, torus=(16, 16, 16), intra=Link(bytes_per_s=6 * 50e9))
    # a quarter of what all devices send crosses the middle each way, over 2 x 256 links, wrap-around included
    assert torus.alltoall_intra().bytes_per_s * 4096 / 4 == pytest.approx(2 * 256 * 50e9)
    # GShard: the time of an all-to-all grows with the side of the torus
    assert torus.alltoall_intra(512).bytes_per_s == pytest.approx(2 * torus.alltoall_intra().bytes_per_s)
    assert CLUSTER.alltoall_intra() == CLUSTER.intra


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"devices_per_node": 0}, "cluster.devices_per_node=0 must be at least 1"),
        ({"oversubscription": 0.5}, "cluster.oversubscription=0.5 must be at least 1"),
        ({"torus": (2, 3)}, r"cluster.torus=\[2, 3\] holds 6 devices; cluster.devices_per_node=8 must be 6"),
    ],
)
def test_impossible_clusters_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        replace(CLUSTER, **change)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bytes_per_s": 0.0}, "link.bytes_per_s=0.0 must be above 0"),
        ({"bytes_per_s": 1.0, "latency_s": -1.0}, "link.latency_s=-1.0 must be at least 0"),
    ],
)
def test_impossible_links_are_refused(fields: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Link(**fields)


def test_a_device_held_to_less_than_its_power_is_slower_by_the_cube_root() -> None:
    assert DEVICE.peak_flops_per_s.at_power(1 / 8).bf16 == pytest.approx(5e11)
    held, free = CLUSTERS["h100-hbm2e"], CLUSTERS["dgx-h100"]
    assert held.device_watt / free.device_watt == pytest.approx(5 / 7)
    assert held.device.flops_per_s("fp8") == pytest.approx(free.device.flops_per_s("fp8") * (5 / 7) ** (1 / 3))


def test_an_all_to_all_on_switches_reaches_its_share_of_the_link() -> None:
    cluster = replace(CLUSTER, alltoall_share=0.9)
    assert cluster.alltoall_intra(4).bytes_per_s == pytest.approx(0.9e11)
    with pytest.raises(ConfigError, match=r"cluster.alltoall_share=1.5 must be above 0 and up to 1"):
        replace(CLUSTER, alltoall_share=1.5)


def test_a_precision_the_device_lacks_is_refused_with_those_it_has() -> None:
    assert DEVICE.flops_per_s("bf16") == 1e12
    with pytest.raises(ConfigError, match=r"precision='fp8' .*toy computes in: bf16"):
        DEVICE.flops_per_s("fp8")
