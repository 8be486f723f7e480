"""Every router with every capacity policy, expert backend and loss: what equals the oracle, and what refuses and why.

`python -m tests.contracts.support` runs them all and writes docs/support.md from what happened.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from tests.contracts.cases import Case, loss_of, simple_case, takers
from tests.contracts.dense import KNOWN_LOSSES, KNOWN_POLICIES, KNOWN_ROUTERS
from tests.contracts.test_layer_equals_oracle import TOLERANCE, check
from turnout.contracts import CapacityPolicy, Loss, RouterConfig
from turnout.errors import ConfigError
from turnout.routers import (
    Cosine,
    DeepSeekV3,
    DeviceLimited,
    LocMoE,
    LocMoEPlus,
    NoisyTopK,
    Quantile,
    ReMoE,
    Sinkhorn,
    Switch,
    TopP,
)

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
NUM_EXPERTS = 12
ASKED = "row asked"
LOSSES_ALONE = ("none", "loop")  # the policy and the backend under which each loss is tried by itself
# the file of tests/contracts that judges a row the dense oracle has no formula for
JUDGES = {"base": "test_balanced_routers.py", **dict.fromkeys(("forced", "hierarchical"), "test_other_routers.py")}
# settings that do something where the defaults are idle, and whether they train; buffers are drawn (`cases.BUFFERS`)
SETTINGS: dict[str, tuple[tuple[RouterConfig, bool], ...]] = {
    "cosine": ((Cosine(k=3, renormalize=False, temperature=0.1), True),),
    "deepseek_v3": ((DeepSeekV3(k=4, groups=4, top_groups=2), True),),
    "device_limited": ((DeviceLimited(k=4, groups=4, top_groups=2, scale=2.5), True),),
    "locmoe": ((LocMoE(relu=True), True),),
    # of the first two one is drawn before its switch and one after it
    "locmoe_plus": (
        (LocMoEPlus(k=2, mode="hybrid", before_switch="expert_choice", switch_step=5, gate="learned"), True),
        (LocMoEPlus(k=2, mode="expert_choice", before_switch="hybrid", switch_step=5), True),
        (LocMoEPlus(k=2, evaluation="mode", threshold=0.4, floor="none", mass="weight"), False),
    ),
    "noisy_topk": ((NoisyTopK(k=3), False),),
    "quantile": ((Quantile(k=3, rounds=3, activation="sigmoid", scale=2.5), True), (Quantile(), False)),
    "remoe": ((ReMoE(balanced=False), True),),
    "sinkhorn": ((Sinkhorn(k=2), True), (Sinkhorn(), False)),
    "switch": ((Switch(jitter=0.3), True),),
    "top_p": ((TopP(p=0.7, most=3), True),),
}


@dataclass(frozen=True, kw_only=True)
class Support:
    """One router with one policy on one backend."""

    router: str
    capacity: str
    backend: str
    dtype: torch.dtype
    losses: tuple[str, ...]  # all that this router can feed, together in one layer
    layers: int  # that were compared
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
    """Run layers forward and backward against the oracle, with every loss they can have; on `loop` with each alone too.

    Raises: AssertionError if they differ.
    """
    config = RouterConfig.TABLE[router]()
    rows, refused = fitting_losses(config)
    dtype = _dtype(backend)
    plain = simple_case(
        router=config,
        capacity=CapacityPolicy.TABLE[capacity](),
        num_experts=NUM_EXPERTS,
        losses=tuple(rows.values()),
        padding=0.3,
        shared_hidden=7,
        shape=(3, 14),
    )
    alone = [replace(plain, losses=(loss,)) for loss in rows.values()] if (capacity, backend) == LOSSES_ALONE else []
    cases = [plain, *with_settings(plain, router), *alone]
    return Support(
        router=router,
        capacity=capacity,
        backend=backend,
        dtype=dtype,
        losses=tuple(rows),
        layers=len(cases),
        refused=refused,
        error=max(check(case, backend=backend, dtype=dtype) for case in cases),
    )


def with_settings(plain: Case, router: str) -> list[Case]:
    """The case with each of the router's other settings, and other draws."""
    settings = enumerate(SETTINGS.get(router, ()), start=1)
    return [replace(plain, seed=seed, router=other, training=training) for seed, (other, training) in settings]


def fitting_losses(config: RouterConfig) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses this router can feed, and why it cannot feed the others."""
    rows, refused = {}, {}
    for name in Loss.TABLE.names():
        loss = loss_of(name, NUM_EXPERTS)
        try:
            loss.check(config, NUM_EXPERTS)
        except ConfigError as error:
            refused[name] = str(error)
        else:
            rows[name] = loss
    return rows, refused


def refused_cell(config: RouterConfig) -> str:
    """What the page says of the losses this router cannot feed."""
    rows, refused = fitting_losses(config)
    return (", ".join(refused) or "none") if rows else "all"


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
        f"every expert backend ({sum(s.layers for s in found)} layers of {NUM_EXPERTS} experts, 30 % padding, a shared",
        "expert): at its defaults and, where these are idle, with others (`SETTINGS`: groups a token cannot all reach,",
        "prices, a switch of mode, evaluation). Each has every loss the router can feed; with policy `none` on `loop`",
        "each loss has a layer to itself, too. Output, losses and all gradients are compared with the dense oracle and",
        "with the papers' formulas in plain loops (`tests/contracts/paper_*.py`). A cell is the worst relative error",
        "over the policies; a pair that cannot be is refused when the layer is built.",
        "",
        f"Where there is no formula for a row, the row itself is asked (`{ASKED}`): the figure then says that",
        "dispatch, experts, combination and the gradients around the row are right, and not that the row is; the tests",
        "named, in `tests/contracts`, judge the row by its paper, alone.",
        "",
        "| router | routing by | " + " | ".join(f"{b} ({_short(_dtype(b))})" for b in columns) + " | losses refused |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for router, row in RouterConfig.TABLE.items():
        own = [s for s in found if s.router == router]
        cells = [f"{max(s.error for s in own if s.backend == b):.0e}" for b in columns]
        judged, refused = judge(router, row, KNOWN_ROUTERS), refused_cell(row())
        lines.append(f"| {router} | {judged} | {' | '.join(cells)} | {refused} |")
    reasons = {name: why for s in found if s.losses for name, why in s.refused.items()}
    reasons |= {f"all with {s.router}": s.refused["load_balance"] for s in found if not s.losses}
    lines += ["", "| capacity policy or loss | judged by |", "|---|---|"]
    lines += [f"| {name} | {judge(name, row, KNOWN_POLICIES)} |" for name, row in CapacityPolicy.TABLE.items()]
    lines += [f"| {name} | {judge(name, row, KNOWN_LOSSES)} |" for name, row in Loss.TABLE.items()]
    lines += [
        "",
        "Capacities by score, by chance or by affinity hang on the last bits of weights: the formulas of the policies",
        "are given the weights of the layer, which the outputs judge.",
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
    print(f"{sum(s.layers for s in found)} layers equal the oracle; wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
