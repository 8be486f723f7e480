"""Every router with every capacity policy, expert backend and loss: what equals the oracle, and what refuses and why.

`python -m tests.contracts.support` runs them all and writes docs/support.md from what happened.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from tests.contracts.cases import Case, simple_case, takers
from tests.contracts.test_layer_equals_oracle import TOLERANCE, check
from turnout.contracts import CapacityPolicy, Loss, RouterConfig
from turnout.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
NUM_EXPERTS = 12


@dataclass(frozen=True, kw_only=True)
class Support:
    """One router with one policy on one backend."""

    router: str
    capacity: str
    backend: str
    dtype: torch.dtype
    losses: tuple[str, ...]  # all that this router can feed, together in one layer
    refused: dict[str, str]  # loss -> why the layer will not be built
    error: float  # worst of outputs, losses and gradients, relative


def backends() -> list[str]:
    """Those that take some dtype of TOLERANCE on this machine."""
    return sorted({name for dtype in TOLERANCE for name in takers(dtype)})


def combinations() -> Iterator[tuple[str, str, str]]:
    """Names of router, policy and backend: all of them."""
    return product(RouterConfig.TABLE.names(), CapacityPolicy.TABLE.names(), backends())


def support(router: str, capacity: str, backend: str) -> Support:
    """Run one layer forward and backward against the oracle, with every loss it can have.

    Raises: AssertionError if they differ.
    """
    config = RouterConfig.TABLE[router]()
    rows, refused = {}, {}
    for name, row in Loss.TABLE.items():
        # over one device, the balance of devices is a constant
        settings = {"groups": 2} if name in ("device_balance", "communication_balance") else {}
        loss = row(**settings)  # type: ignore[call-arg]
        try:
            loss.check(config, NUM_EXPERTS)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        rows[name] = loss
    dtype = _dtype(backend)
    case: Case = simple_case(
        router=config,
        capacity=CapacityPolicy.TABLE[capacity](),
        num_experts=NUM_EXPERTS,
        losses=tuple(rows.values()),
        padding=0.3,
        shared_hidden=7,
        shape=(3, 14),
    )
    worst = check(case, backend=backend, dtype=dtype)
    return Support(
        router=router,
        capacity=capacity,
        backend=backend,
        dtype=dtype,
        losses=tuple(rows),
        refused=refused,
        error=worst,
    )


def page(found: list[Support]) -> str:
    """The table as Markdown."""
    capacities, columns = CapacityPolicy.TABLE.names(), backends()
    lines = [
        "# What goes with what",
        "",
        "Written by `python -m tests.contracts.support`, which builds every router with every capacity policy on",
        f"every expert backend ({len(found)} layers of {NUM_EXPERTS} experts, 30 % padding, a shared expert), each",
        "with every loss the router can feed, and compares output, losses and all gradients with the dense oracle. A",
        "cell is the worst relative error over the policies; a pair that cannot be is refused when the layer is built.",
        "",
        "| router | " + " | ".join(f"{b} ({_short(_dtype(b))})" for b in columns) + " | losses refused |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for router in RouterConfig.TABLE.names():
        own = [s for s in found if s.router == router]
        cells = [f"{max(s.error for s in own if s.backend == b):.0e}" for b in columns]
        refused = ", ".join(own[0].refused) if own[0].losses else "all"
        lines.append(f"| {router} | {' | '.join(cells)} | {refused or 'none'} |")
    reasons = {name: why for s in found if s.losses for name, why in s.refused.items()}
    reasons |= {f"all with {s.router}": s.refused["load_balance"] for s in found if not s.losses}
    lines += ["", f"Capacity policies: {', '.join(capacities)}. Losses: {', '.join(Loss.TABLE.names())}.", ""]
    lines += [f"- `{name}`: {why}" for name, why in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def _dtype(backend: str) -> torch.dtype:
    return next(dtype for dtype in TOLERANCE if backend in takers(dtype))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    found = [support(*names) for names in combinations()]
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"{len(found)} combinations equal the oracle; wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
