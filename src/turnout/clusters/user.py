"""A user's own machine: a TOML file whose numbers are in the unit their name says, or carry their unit."""

import re
from pathlib import Path
from typing import Any

from turnout.clusters.table import CLUSTERS
from turnout.config import from_dict, load_toml
from turnout.errors import ConfigError
from turnout.registry import nearest
from turnout.topology import Cluster

PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
# kind of quantity, by the end of a field's name: (units and their factors, example, smallest and largest sane value)
KINDS: dict[str, tuple[dict[str, float], str, float, float]] = {
    "bytes_per_s": (
        {f"{p}B/s": f for p, f in (PREFIX | BINARY).items()} | {f"{p}b/s": f / 8 for p, f in PREFIX.items()},
        "'450 GB/s', '400 Gb/s' or 4.5e11",
        1e6,
        1e15,
    ),
    "flops_per_s": ({f"{p}FLOP/s": f for p, f in PREFIX.items()}, "'989 TFLOP/s' or 9.89e14", 1e9, 1e18),
    "memory_bytes": ({f"{p}B": f for p, f in (PREFIX | BINARY).items()}, "'80 GB', '80 GiB' or 8e10", 1e6, 1e14),
    "latency_s": ({"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}, "'3.7 us' or 3.7e-6", 0.0, 1.0),
}


def load_cluster(name_or_path: str) -> Cluster:
    """The built-in machine of that name, or the one a `.toml` file describes.

    Raises: ConfigError naming the built-in machines, or the field of the file, its value and what it may be.
    """
    if name_or_path.endswith(".toml"):
        return cluster_from(load_toml(Path(name_or_path)), default_name=Path(name_or_path).stem)
    if name_or_path not in CLUSTERS:
        raise ConfigError(
            f"unknown cluster {name_or_path!r}; available: {', '.join(CLUSTERS.names())}, or the path of a .toml file"
            f"{nearest(name_or_path, CLUSTERS.names())}"
        )
    return CLUSTERS[name_or_path]


def cluster_from(data: dict[str, Any], *, default_name: str = "mine") -> Cluster:
    """The machine a parsed file describes; `base = "dgx-h100"` takes over what it leaves out.

    Raises: ConfigError for an unknown field, a missing one, a wrong unit, or a value no machine has.
    """
    data = dict(data)
    base = data.pop("base", None)
    if base is not None:
        from_base = _as_dict(CLUSTERS[base]) | {"name": default_name, "sources": ()}
        data = _merged(from_base, data)
    return from_dict(Cluster, _in_base_units({"name": default_name} | data, ""))


def quantity(value: Any, field: str) -> Any:
    """`value` of the field in its base unit (bytes, seconds, FLOP/s); fields without a unit pass as they are.

    Raises: ConfigError for a unit of another kind, or a size out of all proportion, which is a forgotten prefix.
    """
    kind = _kind(field)
    if kind is None or isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    units, example, least, most = KINDS[kind]
    number = _parsed(value, field, units, example) if isinstance(value, str) else float(value)
    if number != 0 and not least <= number <= most:
        raise ConfigError(f"{field}={value!r} is {number:g} in base units, which no machine has; write {example}")
    return number


def _kind(field: str) -> str | None:
    name = field.rpartition(".")[2]
    if ".peak_flops_per_s." in field:
        return "flops_per_s"
    return next((end for end in KINDS if name.endswith(end)), None)


def _parsed(text: str, field: str, units: dict[str, float], example: str) -> float:
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*", text)
    if found is None or found[1].count(".") > 1:
        raise ConfigError(f"{field}={text!r} is not a number with a unit; write {example}")
    if found[2] not in units:
        raise ConfigError(
            f"{field}={text!r} has the unit {found[2]!r}, which is not one of this field; write {example}"
            f"{nearest(found[2], list(units))}"
        )
    return float(found[1]) * units[found[2]]


def _in_base_units(data: dict[str, Any], where: str) -> dict[str, Any]:
    return {
        key: _in_base_units(value, f"{where}{key}.") if isinstance(value, dict) else quantity(value, f"{where}{key}")
        for key, value in data.items()
    }


def _as_dict(value: Any) -> dict[str, Any]:
    fields = vars(value)
    return {key: _as_dict(part) if hasattr(part, "__dataclass_fields__") else part for key, part in fields.items()}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], value) for key, value in over.items() if isinstance(value, dict) and key in base}
    return base | over | both
