"""What was measured on a device, in two files of the cache: the fastest config of a shape, and races with a rival."""

import contextlib
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turnout.cache import default_cache
from turnout.kernels.gpu.configs import Config, candidates


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a measurement holds for: one kind of device, software, and experts."""

    device: str
    dtype: str
    dim: int
    hidden: int
    num_experts: int
    kind: str

    @property
    def key(self) -> str:
        """Its name in the files; another torch may bring another Triton, and faster or slower rivals."""
        sizes = f"D{self.dim} F{self.hidden} E{self.num_experts} {self.kind}"
        return f"{self.device} | torch {torch.__version__} | {self.dtype} | {sizes}"


def shape_of(sizes: tuple[int, ...], kind: str, device: torch.device, dtype: torch.dtype) -> Shape:
    """`sizes` are those of the second matrix, (E, F, D); `device` and `dtype` those of the rows."""
    num_experts, hidden, dim = sizes
    return Shape(
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        dim=dim,
        hidden=hidden,
        num_experts=num_experts,
        kind=kind,
    )


@functools.cache
def config_for(shape: Shape, size: int) -> Config:
    """The config measured to be fastest for assignments of that `size_of`, or the likeliest."""
    likeliest = candidates_for(shape, size)[0]
    found = _read("tuned.json").get(f"{shape.key} | N2^{size}")
    with contextlib.suppress(TypeError, ValueError, KeyError):
        config = Config.of_list(found["config"])  # type: ignore[index]
        return config if config.rows == likeliest.rows else likeliest
    return likeliest


def candidates_for(shape: Shape, size: int) -> tuple[Config, ...]:
    """Configs worth a try for assignments of that `size_of`."""
    return candidates(2**size, shape.num_experts, getattr(torch, shape.dtype))


def size_of(num_assignments: int) -> int:
    """Sizes within a factor of two are one: the nearest power of two below."""
    return max(num_assignments, 1).bit_length() - 1


def keep_config(shape: Shape, num_assignments: int, config: Config, *, ms: float) -> None:
    """From now on `config_for` gives it."""
    size = size_of(num_assignments)
    _write("tuned.json", f"{shape.key} | N2^{size}", {"config": config.as_list(), "ms": round(ms, 4)})
    config_for.cache_clear()


def keep_race(shape: Shape, where: str, *, rival: str, ms: float, rival_ms: float) -> None:
    """Medians of one run, in turns; `where` says of how many tokens, and whether a backward pass belonged to it."""
    entry = _read("races.json").get(shape.key)
    measured = dict(entry) if isinstance(entry, dict) else {}
    measured[where] = {"rival": rival, "ms": round(ms, 4), "rival_ms": round(rival_ms, 4)}
    _write("races.json", shape.key, measured)


def race_failure(shape: Shape) -> str:
    """Why nothing says that the kernels are faster than what torch has, or nothing."""
    measured = _read("races.json").get(shape.key)
    if not isinstance(measured, dict) or not measured:
        return f"never raced here with such experts (turnout.bench.experts_race does it; {shape.key})"
    for where, times in measured.items():
        try:
            is_won = times["ms"] < times["rival_ms"]
            told = f"slower at {where}: {times['ms']:g} ms against {times['rival_ms']:g} of {times['rival']}"
        except (TypeError, KeyError, ValueError):
            return f"without a race that can be read: {where} in {default_cache() / 'gpu' / 'races.json'}"
        if not is_won:
            return told
    return ""


@functools.cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return f"{torch.cuda.get_device_name(device)} sm{''.join(map(str, torch.cuda.get_device_capability(device)))}"


def _read(name: str) -> dict[str, Any]:
    path = default_cache() / "gpu" / name
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


@functools.lru_cache(maxsize=8)
def _parsed(path: Path, changed_ns: int) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _write(name: str, key: str, value: Any) -> None:
    """A cache that cannot be written is none; of two processes at once the last keeps its entry."""
    path = default_cache() / "gpu" / name
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({**_read(name), key: value}, indent=1), encoding="utf-8")
        os.replace(fresh, path)
