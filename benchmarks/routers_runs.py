"""Runs of a comparison of routers: read, joined, and set beside those of one router at the same seed."""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import turnout.routers  # noqa: F401  (they fill the table)
from turnout.contracts import RouterConfig

BESIDE = "topk"  # whose loss the others stand beside


def check_alike(by_router: dict[str, list[dict[str, Any]]]) -> None:
    """Raises: SystemExit if a router had other tokens than the one beside it, or no seed in common with it."""
    wanted = {run["tokens"] for run in by_router[BESIDE]}
    for name, runs in by_router.items():
        if {run["tokens"] for run in runs} != wanted:
            sys.exit(f"{name} was trained on another number of tokens than {BESIDE}: their losses do not compare")
        if not differences(runs, by_router[BESIDE]):
            sys.exit(f"{name} has no seed in common with {BESIDE}")


def read(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row | {"file": path.name} for row in rows]


def by_router_of(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The recipe's name, and the complete runs of each router."""
    recipe = _shared_start([row["recipe"] for row in rows])
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["complete"]:
            found[row["recipe"].removeprefix(f"{recipe}-")].append(row)
    return recipe, found


def _shared_start(names: Sequence[str]) -> str:
    router = next(r for r in sorted(RouterConfig.TABLE.names(), key=len, reverse=True) if names[0].endswith(f"-{r}"))
    return names[0].removesuffix(f"-{router}")


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def differences(runs: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> list[float]:
    """Loss less that of the other router at the same seed."""
    same_seed = {run["seed"]: run["val_loss"] for run in beside}
    return [run["val_loss"] - same_seed[run["seed"]] for run in runs if run["seed"] in same_seed]


def order_of(by_router: dict[str, list[dict[str, Any]]]) -> list[str]:
    return sorted(by_router, key=lambda name: mean(by_router[name], "val_loss"))


def speed(runs: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> str:
    """Tokens a second over the other router's in the same comparison, mean over seeds."""
    same = {(run["file"], run["seed"]): run["tokens_per_s"] for run in beside}
    found = [run["tokens_per_s"] / same[key] for run in runs if (key := (run["file"], run["seed"])) in same]
    return f"{statistics.fmean(found):.2f}" if found else "-"
