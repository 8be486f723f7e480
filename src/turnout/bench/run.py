"""What all cases share: the gate before anything is timed, the keys of a row, and what the numbers were measured on."""

import os
import platform
from dataclasses import fields
from importlib import metadata
from typing import Any

import torch

from turnout.bench.race import Ratio, Timing
from turnout.contracts import Loss, RouterConfig
from turnout.errors import TurnoutError
from turnout.train.doctor import examine


def check_gate() -> None:
    """Raises: TurnoutError naming each expert backend that does not compute what the oracle computes here."""
    broken = [f"{row.name}: {row.reason}" for row in examine()["backends"] if row.available and not row.proven]
    if broken:
        raise red_gate("; ".join(broken))


def red_gate(why: str) -> TurnoutError:
    """What is raised before anything is timed that does not compute what it ought to."""
    return TurnoutError(f"no number is printed on a red gate: {why}")


def row(case: str, peer: str, timing: Timing) -> dict[str, Any]:
    """The keys that rows of all cases have; null until the case fills them in."""
    return {
        "case": case,
        "mode": "train",
        "peer": peer,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "ms_min": min(timing.ms),
        "ms_median": timing.median,
        "ms_max": max(timing.ms),
        "ratio_to_dense": None,
        "ratio_to_limit": None,
        "peak_mib": None,
    }


def ratio_keys(name: str, value: Ratio | None) -> dict[str, Any]:
    """NAME, the median over rounds, and NAME_quartiles; both null where one of the two was not measured."""
    if value is None:
        return {name: None, f"{name}_quartiles": None}
    return {name: value.median, f"{name}_quartiles": [value.low, value.high]}


def result(rows: list[dict[str, Any]], *packages: str, **more: Any) -> dict[str, Any]:
    """What `--json` prints: the rows, whatever else the case has to say, versions and machine."""
    return {"rows": rows, **more, "versions": _versions(packages), "machine": _machine()}


def words(part: RouterConfig | Loss) -> str:
    """A router or a loss by its name and the settings that are not at their default: `hash(k=2, scale=2.0)`."""
    values = {field.name: (getattr(part, field.name), field.default) for field in fields(part)}  # type: ignore[arg-type]
    changed = [
        f"{name}={words(value) if isinstance(value, RouterConfig) else value}"
        for name, (value, default) in values.items()
        if name == "k" or value != default
    ]
    name = type(part).TABLE.name_of(type(part))  # type: ignore[arg-type]
    return f"{name}({', '.join(changed)})" if changed else name


def _machine() -> dict[str, object]:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {"processor": _processor(), "cores": len(cores), "system": platform.system(), "device": "cpu"}


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
