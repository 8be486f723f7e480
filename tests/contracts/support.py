"""Every router with every capacity policy, expert backend and loss: what equals the oracle, and what refuses and why.

`python -m tests.contracts.support` runs them all and writes docs/support.md from what happened.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from tests.contracts.cases import Case, loss_of, simple_case, takers
from tests.contracts.dense import KNOWN_LOSSES, KNOWN_POLICIES, KNOWN_ROUTERS
from tests.contracts.test_layer_equals_oracle import TOLERANCE, check
from turnout.contracts import CapacityPolicy, Loss, RouterConfig
from turnout.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
NUM_EXPERTS = 12
ASKED = "row asked"
# the file of tests/contracts that judges a row the dense oracle has no formula for
JUDGES = {
    **dict.fromkeys(("cosine", "device_limited", "noisy_topk", "top_p"), "test_token_choice.py"),
    **dict.fromkeys(("base", "expert_choice", "quantile", "remoe", "sinkhorn"), "test_balanced_routers.py"),
    **dict.fromkeys(("forced", "hierarchical"), "test_other_routers.py"),
    **dict.fromkeys(("locmoe", "locmoe_plus", "locality"), "test_locmoe.py"),
    **dict.fromkeys(("affinity", "tutel"), "test_capacity.py"),
    **dict.fromkeys(("communication_balance", "device_balance", "entropy"), "test_losses.py"),
    **dict.fromkeys(("importance", "load_cv"), "test_losses.py"),
}


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


def drawn(router: str) -> Iterator[tuple[str, str, str]]:
    """Every second of the router's, so that each backend and each policy still meets it."""
    policies = enumerate(CapacityPolicy.TABLE.names())
    for (i, policy), (j, backend) in product(policies, enumerate(backends())):
        if (i + j) % 2 == RouterConfig.TABLE.names().index(router) % 2:
            yield router, policy, backend


def support(router: str, capacity: str, backend: str) -> Support:
    """Run one layer forward and backward against the oracle, with every loss it can have.

    Raises: AssertionError if they differ.
    """
    config = RouterConfig.TABLE[router]()
    rows, refused = {}, {}
    for name in Loss.TABLE.names():
        loss = loss_of(name, NUM_EXPERTS)
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


def judge(name: str, row: type, known: tuple[type, ...]) -> str:
    """Who says what this row should give: the oracle, or the row itself and the tests that judge it elsewhere."""
    return "oracle" if issubclass(row, known) else f"{ASKED}; {JUDGES[name]}"


def page(found: list[Support]) -> str:
    """The table as Markdown."""
    columns = backends()
    lines = [
        "# What goes with what",
        "",
        "Written by `python -m tests.contracts.support`, which builds every router with every capacity policy on",
        f"every expert backend ({len(found)} layers of {NUM_EXPERTS} experts, 30 % padding, a shared expert), each",
        "with every loss the router can feed, and compares output, losses and all gradients with the dense oracle. A",
        "cell is the worst relative error over the policies; a pair that cannot be is refused when the layer is built.",
        "",
        f"Where the oracle has no formula of its own for a row, the row itself is asked (`{ASKED}`): the figure then",
        "says that dispatch, experts, combination and the gradients around the row are right, and not that the row is;",
        "the tests named, in `tests/contracts`, judge the row by its paper, alone.",
        "",
        "| router | routing by | " + " | ".join(f"{b} ({_short(_dtype(b))})" for b in columns) + " | losses refused |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for router, row in RouterConfig.TABLE.items():
        own = [s for s in found if s.router == router]
        cells = [f"{max(s.error for s in own if s.backend == b):.0e}" for b in columns]
        refused = ", ".join(own[0].refused) if own[0].losses else "all"
        lines.append(f"| {router} | {judge(router, row, KNOWN_ROUTERS)} | {' | '.join(cells)} | {refused or 'none'} |")
    reasons = {name: why for s in found if s.losses for name, why in s.refused.items()}
    reasons |= {f"all with {s.router}": s.refused["load_balance"] for s in found if not s.losses}
    lines += ["", "| capacity policy or loss | judged by |", "|---|---|"]
    lines += [f"| {name} | {judge(name, row, KNOWN_POLICIES)} |" for name, row in CapacityPolicy.TABLE.items()]
    lines += [f"| {name} | {judge(name, row, KNOWN_LOSSES)} |" for name, row in Loss.TABLE.items()]
    lines += [
        "",
        "Routers whose tokens differ in their number of choices: there `fixed` and `load_balance` are asked, too.",
        "",
    ]
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
