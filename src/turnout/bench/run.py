"""Gate, race, rows: one benchmark case from proof to numbers."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from turnout.bench import train_step
from turnout.bench.measure import machine, peak_mib, race, versions
from turnout.errors import TurnoutError
from turnout.registry import Table
from turnout.train.doctor import examine
from turnout.train.recipe import Recipe

CASES: Table[Any] = Table("benchmark case")
CASES.register("train-step")(train_step)


def run_case(
    case: str, recipe: Recipe, dense: Recipe, *, peers: tuple[str, ...], rounds: int, warmup: int, memory: bool
) -> dict[str, Any]:
    """Rows with min, median and max milliseconds, and ratios to the dense twin and to bare GEMMs of the same run.

    Raises: TurnoutError, before anything is timed, if a backend does not compute what the oracle computes.
    """
    check_gate()
    module = CASES[case]
    names = peers or module.PEERS
    timings = race(module.contestants(recipe, dense, peers=names), rounds=rounds, warmup=warmup)
    tokens = recipe.loop.batch_size * recipe.loop.seq_len
    rows = []
    for name in names:
        timing = timings[name]
        rows.append(
            {
                "case": case,
                "mode": "train",
                "peer": name,
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                **vars(timing),
                "tokens_per_s": 1e3 * tokens / timing.ms_median,
                "speedup_of_turnout": _ratio(timings, name, "turnout"),
                "ratio_to_dense": _ratio(timings, "dense-twin", name),
                "ratio_to_limit": _ratio(timings, "gemm-limit", name),
                "peak_mib": _peak(module.few_steps, name, recipe, dense) if memory else None,
            }
        )
    return {"rows": rows, "versions": versions("transformers"), "machine": machine()}


def check_gate() -> None:
    """Raises: TurnoutError naming each backend that is not proven here."""
    broken = [f"{row.name}: {row.reason}" for row in examine()["backends"] if row.available and not row.proven]
    if broken:
        raise TurnoutError(f"no number is printed on a red gate: {'; '.join(broken)}")


def _ratio(timings: dict[str, Any], numerator: str, denominator: str) -> float | None:
    if numerator not in timings or denominator not in timings:
        return None
    return timings[numerator].ms_median / timings[denominator].ms_median


def _peak(function: Callable[..., None], name: str, recipe: Recipe, dense: Recipe) -> float | None:
    return None if name == "gemm-limit" else peak_mib(functools.partial(function, name, recipe, dense))
