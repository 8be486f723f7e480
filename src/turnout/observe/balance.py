"""Load balance in a dozen numbers: pure arithmetic on counts per expert.

With u = count * E / (sum of counts), the load over the fair share: 1.0 is fair, 0 is dead.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnout.observe.snapshot import Snapshot

DEAD_LOAD = 0.001  # an expert below 0.1 % of its fair share is dead


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Balance of one step. A plain name is the mean over layers; `_worst` the worst of them.

    The training loop adds up a step's micro-batches before it records: these are then counted together. Of statistics
    given to the recorder one by one, mean and worst are over micro-batches and layers, where not said otherwise.
    """

    max_violation: float  # max(u) - 1; 0 is even
    max_violation_worst: float
    max_violation_global: float  # all micro-batches counted together: of a training, the same as max_violation
    cv: float  # standard deviation of u; 0 is even
    cv_worst: float
    entropy: float  # of the load, over ln E; 1 is even
    entropy_worst: float
    router_entropy: float  # of the router's probabilities, over ln E; 1 is undecided
    dead_experts: int  # below DEAD_LOAD in the whole step, all layers together
    dead_experts_worst: int  # in one layer
    dropped_share: float  # of all assignments of the step, for want of room
    dropped_share_worst: float  # of one layer's
    declined_share: float  # of all assignments of the step, left out by the router's design
    declined_share_worst: float  # of one layer's
    margin: float  # best minus second best score
    margin_worst: float


def balance(snapshot: Snapshot) -> Balance:
    """The balance of one step; NaN where no token was routed."""
    size, starts = snapshot.num_experts, snapshot.starts
    load = load_over_fair(snapshot.assigned, size)
    step_load = load_over_fair(snapshot.assigned.sum(axis=0, keepdims=True), size)
    violation = np.maximum.reduceat(load, starts, axis=1) - 1
    cv = np.sqrt(np.add.reduceat((load - 1) ** 2, starts, axis=1) / size)
    entropy = load_entropy(load, size)
    dead = np.add.reduceat(step_load < DEAD_LOAD, starts, axis=1, dtype=np.int64)
    counted = (snapshot.dropped, snapshot.declined, snapshot.assigned)
    dropped, declined, assigned = (_by_layer(x, starts) for x in counted)
    with np.errstate(invalid="ignore", divide="ignore"):
        margin = snapshot.margin_sum / snapshot.num_routed
        router_entropy = snapshot.entropy_sum / snapshot.num_routed / np.maximum(np.log(size), 1e-12)
        dropped_by_layer, declined_by_layer = dropped / assigned, declined / assigned
        dropped_share, declined_share = dropped.sum() / assigned.sum(), declined.sum() / assigned.sum()
    return Balance(
        max_violation=_mean(violation),
        max_violation_worst=_worst(violation),
        max_violation_global=_mean(np.maximum.reduceat(step_load, starts, axis=1) - 1),
        cv=_mean(cv),
        cv_worst=_worst(cv),
        entropy=_mean(entropy),
        entropy_worst=-_worst(-entropy),
        router_entropy=_mean(router_entropy[:, size > 1]),
        dead_experts=int(dead.sum()),
        dead_experts_worst=int(dead.max()),
        dropped_share=float(dropped_share),
        dropped_share_worst=_worst(dropped_by_layer),
        declined_share=float(declined_share),
        declined_share_worst=_worst(declined_by_layer),
        margin=_mean(margin),
        margin_worst=-_worst(-margin),
    )


def load_over_fair(counts: NDArray[np.integer], num_experts: NDArray[np.int64]) -> NDArray[np.float64]:
    """u for each column of [..., experts of all layers]; NaN in a layer without assignments."""
    starts = np.cumsum(num_experts) - num_experts
    totals = np.add.reduceat(counts, starts, axis=-1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts * np.repeat(num_experts / totals, num_experts, axis=-1)


def load_entropy(load: NDArray[np.float64], num_experts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Entropy of each layer's load over ln E: 1 is even, 0 is one expert taking all (and 1 for a single expert)."""
    starts = np.cumsum(num_experts) - num_experts
    share = load / np.repeat(num_experts, num_experts)
    # 0 ln 0 is 0; NaN stays NaN
    nats = -np.add.reduceat(share * np.log(np.where(share == 0, 1, share)), starts, axis=-1)
    return np.where(num_experts > 1, nats / np.maximum(np.log(num_experts), 1e-12), nats + 1)


def _by_layer(counts: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.add.reduceat(counts.sum(axis=0), starts)


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _worst(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else math.nan
