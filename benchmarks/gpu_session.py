"""All that a GPU is to say about the Triton kernels, in one call of under eight minutes.

Usage: PYTHONPATH=src python benchmarks/gpu_session.py [--out RESULT.json] [--minutes 7.5]

It builds every kernel (in processes side by side), compares them with the oracle on the device, measures the limits
(dense products, a copy in memory), times the router, lets the configs race, and times both layers of docs/gpu.md and
decoding against them, against torch's grouped_mm, and against MegaBlocks, SonicMoE and ScatterMoE where they can be
imported; then both in 8-bit floating point, for inference. Needs torch, triton, numpy and jaxtyping. What there was no
time for is named. The last thing printed is a short table.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "src")]

import torch  # noqa: E402

from benchmarks import gpu_build, gpu_checks, gpu_fp8, gpu_router, gpu_times  # noqa: E402
from turnout.kernels.gpu import device_failure  # noqa: E402

PACKAGES = ("torch", "triton", "numpy", "megablocks", "sonic-moe", "scattermoe")


class Session:
    """Sections run while there is time; a failure is written down and the next one runs."""

    def __init__(self, minutes: float, path: Path, environment: dict[str, Any]) -> None:
        self.started, self.most_s = time.monotonic(), 60 * minutes
        self.path, self.environment = path, environment
        self.found: dict[str, Any] = {}
        self.missed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def section(self, name: str, expected_s: float, run: Callable[[float], Any]) -> None:
        """`run` is told how many seconds are left."""
        begun = time.monotonic()
        left_s = self.most_s - (begun - self.started)
        if left_s < expected_s:
            self.missed[name] = f"no time: {left_s:.0f} s left, {expected_s:.0f} needed"
        else:
            print(f"[{begun - self.started:5.0f} s] {name}", flush=True)
            try:
                self.found[name] = run(left_s)
            except Exception as error:
                self.missed[name] = f"failed: {type(error).__name__}: {error}"[:600]
                print(f"    {self.missed[name]}", flush=True)
        torch.cuda.empty_cache()
        self.seconds[name] = round(time.monotonic() - begun, 1)
        # each time: of a run that is ended from outside, what it had found is there
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result(), indent=1) + "\n", encoding="utf-8")

    def result(self) -> dict[str, Any]:
        """As the file has it."""
        told = {"environment": self.environment, "seconds": self.seconds, "missed": self.missed}
        return {**told, **self.found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--build", default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    failure = device_failure(torch.device("cuda"))
    if failure:
        print(f"gpu_session cannot run here: {failure}", file=sys.stderr)
        return 1
    if asked.build is not None:
        gpu_build.build(asked.build)
        return 0
    environment = _environment()
    path = asked.out or HERE / "results" / f"{environment['date'][:10]}-gpu-session.json"
    session = Session(asked.minutes, path, environment)
    print(json.dumps(environment, indent=1), flush=True)
    session.section("build", 20, lambda left_s: gpu_build.build_all(Path(__file__), most_s=min(left_s - 60, 170)))
    session.section("limits", 10, lambda left_s: gpu_times.limits())
    session.section("proof", 30, lambda left_s: {**gpu_checks.proofs(), **gpu_router.proofs(), **gpu_fp8.proofs()})
    session.section("checks", 30, lambda left_s: {**gpu_checks.checks(), **gpu_fp8.checks()})
    session.section("router", 15, lambda left_s: gpu_router.router())
    for name in gpu_times.LAYERS:
        session.section(name, 40, lambda left_s, name=name: gpu_times.layer(name))
        session.section(f"{name} decode", 20, lambda left_s, name=name: gpu_times.decode(name))
    for name in gpu_times.LAYERS:
        session.section(f"{name} fp8", 20, lambda left_s, name=name: gpu_fp8.layer(name))
        session.section(f"{name} fp8 decode", 15, lambda left_s, name=name: gpu_fp8.decode(name))
    print("\n".join(_table(session.result())), flush=True)
    print(f"wrote {path.name} after {time.monotonic() - session.started:.0f} s", flush=True)
    return 0


def _environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _table(result: dict[str, Any]) -> list[str]:
    """One line a figure: what was timed, milliseconds, and its share of the limit."""
    limits = result.get("limits", {})
    lines = ["", f"{result['environment']['device']}: {json.dumps(limits)}"]
    lines += [f"{'case':44} {'ms':>9} {'share of limit':>15}"]
    for section in result.values():
        for row in section.get("rows", []) if isinstance(section, dict) else []:
            share = "" if row.get("share") is None else f"{row['share']:.2f}"
            lines.append(f"{row['case']:44} {row['ms']:9.3f} {share:>15}")
    lines += [f"off the oracle by {name}: {worst}" for name, worst in result.get("proof", {}).items()]
    lines += [f"check {name}: {told}" for name, told in result.get("checks", {}).items()]
    lines += [f"MISSED {name}: {why}" for name, why in result["missed"].items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
