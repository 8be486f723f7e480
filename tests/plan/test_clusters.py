"""Machines: every description is complete and sane; a user's file is read with its units, or refused with the field."""

from dataclasses import asdict
from pathlib import Path

import pytest

from turnout.clusters import CLUSTERS, DGX_H100, cluster_from, load_cluster
from turnout.config import dump_toml
from turnout.errors import ConfigError

FILE = """
name = "mine"
devices_per_node = 4
oversubscription = 2
nodes_per_leaf = 16
usd_per_device_hour = 1.5

[device]
name = "X1"
generation = "hopper"
memory_bytes = "96 GiB"
memory_bytes_per_s = "2.4 TB/s"
peak_flops_per_s = { bf16 = "989 TFLOP/s" }

[intra]
bytes_per_s = "450 GB/s"
latency_s = "3 us"

[inter]
bytes_per_s = "400 Gb/s"
latency_s = 3.7e-6
"""


@pytest.mark.parametrize("name", CLUSTERS.names())
def test_every_machine_is_complete_and_its_tiers_are_in_order(name: str) -> None:
    cluster = CLUSTERS[name]
    assert cluster.name == name
    assert cluster.sources
    assert all(cluster.sources)
    assert cluster.intra.bytes_per_s > cluster.inter.bytes_per_s
    assert cluster.device.memory_bytes_per_s > cluster.intra.bytes_per_s
    assert max(asdict(cluster.device.peak_flops_per_s).values()) > 1e14
    assert 1e10 < cluster.device.memory_bytes < 1e12


@pytest.mark.parametrize("name", CLUSTERS.names())
def test_a_machine_survives_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(dump_toml(CLUSTERS[name]))
    assert load_cluster(str(path)) == CLUSTERS[name]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "src/turnout/clusters").glob("*.py")))
def test_every_number_of_a_description_has_its_source_beside_it(path: Path) -> None:
    if path.stem in ("__init__", "table", "user"):
        return
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        keyed = any(f"{key}=" in line for key in ("memory_bytes", "bytes_per_s", "device_watt", "host_watt", "units"))
        if keyed and any(character.isdigit() for character in line.partition("=")[2]):
            assert "#" in line or lines[number - 1].strip().startswith("#"), f"{path.name}:{number + 1}: {line}"


def test_a_users_file_is_read_in_its_units(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    cluster = load_cluster(str(path))
    assert cluster.device.memory_bytes == 96 * 2**30
    assert cluster.device.flops_per_s("bf16") == 989e12
    assert (cluster.intra.bytes_per_s, cluster.intra.latency_s) == (450e9, 3e-6)
    assert (cluster.inter.bytes_per_s, cluster.inter.latency_s) == (50e9, 3.7e-6)
    assert cluster.inter_over(17).bytes_per_s == 25e9


def test_a_file_may_build_on_a_known_machine() -> None:
    doubled = cluster_from({"base": "dgx-h100", "name": "fast", "inter": {"bytes_per_s": "800 Gb/s"}})
    assert doubled.inter.bytes_per_s == 100e9
    assert doubled.inter.latency_s == DGX_H100.inter.latency_s
    assert doubled.device == DGX_H100.device


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"inter": {"bytes_per_s": 400}}, "inter.bytes_per_s=400 is 400 in base units, which no machine has; write"),
        ({"inter": {"bytes_per_s": "400 GB"}}, r"inter.bytes_per_s='400 GB' has the unit 'GB'.*did you mean 'GB/s'"),
        ({"inter": {"bytes_per_s": "fast"}}, "inter.bytes_per_s='fast' is not a number with a unit"),
        ({"inter": {"latency_s": "3 GB/s"}}, r"inter.latency_s='3 GB/s' has the unit 'GB/s'"),
        ({"inter": {"latency_s": 3.7}}, r"inter.latency_s=3.7 is 3.7 in base units"),
        ({"inter": {"byte_per_s": 4e11}}, r"unknown field 'inter.byte_per_s'; .*did you mean 'bytes_per_s'"),
        ({"device": {"memory_bytes": 80}}, "device.memory_bytes=80 is 80 in base units.*'80 GB'"),
        ({"device": {"memory_bytes": "80 GHz"}}, "device.memory_bytes='80 GHz' has the unit 'GHz'"),
        ({"device": {"peak_flops_per_s": {"bf16": 989}}}, "device.peak_flops_per_s.bf16=989 is 989 .*TFLOP/s"),
        ({"devices_per_node": "8"}, "devices_per_node='8' must be an integer"),
        ({"torus": [2, 3]}, "devices_per_node=8 must be 6"),
        ({"base": "dgx-h10"}, r"unknown cluster 'dgx-h10'; .*did you mean 'dgx-h100'"),
    ],
)
def test_a_wrong_unit_or_field_is_named(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        cluster_from({"base": "dgx-h100"} | change)


def test_a_missing_field_and_an_unknown_machine_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing field 'device'"):
        cluster_from({"name": "empty"})
    with pytest.raises(ConfigError, match=r"unknown cluster 'h100'; available: .*path of a .toml file"):
        load_cluster("h100")
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.toml"):
        load_cluster(str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize("field", ["usd_per_device_hour", "device_watt", "host_watt", "network_usd_per_device"])
def test_prices_and_powers_below_zero_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.{field}=-5.* must be at least 0"):
        cluster_from({"base": "dgx-h100", field: -5.0})
