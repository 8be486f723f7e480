"""What a placement costs: the seconds of a layer in a step, by the planner's law of links, and what is behind them.

    cost = row_s * max_r L_r  +  4 row_bytes * max(X / inter, I / intra)  +  copies_s  +  move_s / period

L_r are the rows that rank r computes. X is the most rows that one rank sends to other nodes, or receives from them, and
I the same for other ranks of its node: what leaves the node and what stays travel at once, and the slowest rank is
waited for. Where the ranks of a node have one card between them, X is the most that a node sends or receives, over its
ranks. Rows travel four times: there, back, and the gradients of both. `copies_s` are the seconds in which gradients of
experts with copies are summed, by the same law: each copy's goes to one of their ranks, and the sum comes back.
`move_s` are the seconds to move experts here from where they lie, once in `period` steps. Messages are as many wherever
experts lie, but for those of copies, so latency makes no difference.

Rows are those of a program that sends one for each choice of a token (flat, hierarchical). One that sends a token once
to a node or rank moves fewer, by how often a token's experts lie together, which counts of rows do not tell.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnout.balance.errands import expert_moves, twins
from turnout.balance.routed import Holders, Routed, holders_of
from turnout.errors import ConfigError
from turnout.placement import Placement
from turnout.topology import Link

# share of a layer's seconds that a move must save: predictions are not good for less
LEAST_GAIN = 0.01
TRIPS = 4  # of a row and its gradients between its token and its expert


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a layer's rows and experts cost on a machine."""

    row_s: float  # computation of a row on one rank, forward and backward
    row_bytes: float  # of a row on the wire, one way
    expert_bytes: float  # of an expert on a rank: weights, and what the optimizer keeps of them
    intra: Link  # a rank to the others of its node
    inter: Link  # a rank to those of other nodes
    gradient_bytes: float = 0.0  # of an expert on a rank, which copies exchange in every step; 0: nothing is trained
    period: int = 1  # steps over which a move must pay for itself
    shares_card: bool = False  # ranks of a node have one card between them, and `inter` is a rank's part of its rate

    def __post_init__(self) -> None:
        for name in ("row_s", "row_bytes", "expert_bytes", "gradient_bytes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"prices.{name}={getattr(self, name)} must be at least 0 and finite")
        if self.period < 1:
            raise ConfigError(f"prices.period={self.period} must be at least 1 step")

    def slowest_s(self, far: NDArray[np.float64], near: NDArray[np.float64], unit_bytes: float) -> NDArray[np.float64]:
        """Seconds until so many units have left the node, and so many others have travelled inside it."""
        return unit_bytes * np.maximum(far / self.inter.bytes_per_s, near / self.intra.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one layer in one step."""

    compute_s: float  # of the fullest rank
    exchange_s: float  # of all four trips
    move_s: float  # of the move there, once
    copies_s: float  # of the gradients of copies
    step_s: float  # all but the move
    max_load: float  # rows of the fullest rank over the mean of ranks
    inter_bytes: float  # between nodes, of all ranks, four trips
    intra_bytes: float  # between ranks of a node

    def objective(self, prices: Prices) -> float:
        """What the search makes small: seconds of a step, its share of the move included."""
        return self.step_s + self.move_s / prices.period


def pays(before: Cost, after: Cost, prices: Prices) -> bool:
    """Whether a move saves more in its period than it takes, and more than a prediction can be wrong."""
    return after.objective(prices) < (1 - LEAST_GAIN) * before.objective(prices)


def cost_of(where: Placement | Holders, routed: Routed, prices: Prices, *, present: Placement | None = None) -> Cost:
    """The cost of a placement; `present`: where experts lie now, None: nowhere yet."""
    holders = holders_of(where) if isinstance(where, Placement) else where
    sent_RR = routed.sent_RR(holders)
    far_RR = routed.node_R[:, None] != routed.node_R[None, :]
    near_RR = ~far_RR & ~np.eye(len(far_RR), dtype=bool)
    loads_R = sent_RR.sum(axis=0)
    card = routed.mesh.local if prices.shares_card else 1
    exchange_s = TRIPS * prices.slowest_s(
        _busiest(sent_RR * far_RR, card), _busiest(sent_RR * near_RR), prices.row_bytes
    )
    compute_s = prices.row_s * loads_R.max()

    def experts_s(pairs: Iterable[tuple[int, int]], unit_bytes: float) -> float:
        moved_RR = np.zeros_like(sent_RR)
        for sender, receiver in pairs:
            moved_RR[sender, receiver] += 1
        ends = _busiest(moved_RR * far_RR, card), _busiest(moved_RR * near_RR)
        return float(prices.slowest_s(*ends, unit_bytes))

    copies_s = move_s = 0.0
    if isinstance(where, Placement):
        copies_s = experts_s(twins(where), prices.gradient_bytes)
        moves = [] if present is None else [(old, new) for _, old, new in expert_moves(present, where)]
        move_s = experts_s(moves, prices.expert_bytes)
    return Cost(
        compute_s=float(compute_s),
        exchange_s=float(exchange_s),
        move_s=move_s,
        copies_s=copies_s,
        step_s=float(compute_s + exchange_s) + copies_s,
        max_load=float(loads_R.max() / max(loads_R.mean(), 1e-30)),
        inter_bytes=float(TRIPS * prices.row_bytes * (sent_RR * far_RR).sum()),
        intra_bytes=float(TRIPS * prices.row_bytes * (sent_RR * near_RR).sum()),
    )


def _busiest(sent_RR: NDArray[np.float64], card: int = 1) -> NDArray[np.float64]:
    """The most that one rank sends or receives, or a mean rank of those that have a card between them."""
    by_card = [sent_RR.sum(axis=axis).reshape(-1, card).mean(axis=1).max() for axis in (0, 1)]
    return np.maximum(*by_card)
