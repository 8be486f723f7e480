"""What the tuner decides, and by what it knows a step again."""

import math
from dataclasses import dataclass

WINDOW = 128  # rows of an expert that share a key: R of the paper
SKEW_STEP = 1.25  # loads whose imbalance differs by less share one
LIKE = 1.25  # rows of an expert that differ by less teach something of each other


@dataclass(frozen=True, kw_only=True, order=True)
class Choice:
    """How experts are reached: what may change from step to step, for it moves no parameter."""

    adaptive_r: int  # parts an expert computes in; 0: weights come and tokens stay
    overlap: int  # chunks
    alltoall: str  # program

    def __str__(self) -> str:
        return f"r={self.adaptive_r} d={self.overlap} {self.alltoall}"


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A layer, and how its experts lie on ranks."""

    num_experts: int
    top_k: int
    dim: int  # that the experts work in
    hidden: int  # of one expert
    gated: bool
    ep: int
    etp: int
    element_bytes: int = 4  # of a row on the wire

    def __str__(self) -> str:
        kind = "gated" if self.gated else "plain"
        sizes = f"E={self.num_experts} k={self.top_k} D={self.dim} F={self.hidden} {kind} {self.element_bytes} B"
        return f"{sizes} ep={self.ep} etp={self.etp}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows of a layer in one pass, those of all ranks together."""

    shape: LayerShape
    capacity: float  # rows of an expert, on average
    skew: float = 1.0  # rows of the busiest one over that


@dataclass(frozen=True, kw_only=True, order=True)
class Key:
    """Steps that are decided alike. Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, section 4.3."""

    capacity: int  # floor(c / WINDOW)
    skew: int  # floor of the logarithm of the skew, to the base SKEW_STEP
    shape: str
    hardware: str


def key_of(workload: Workload, hardware: str) -> Key:
    """The key of a step on a kind of machine."""
    # the logarithm of 1.25 to the base 1.25 may come out below 1
    skew = math.floor(math.log(max(1.0, workload.skew), SKEW_STEP) + 1e-9)
    return Key(capacity=math.floor(workload.capacity / WINDOW), skew=skew, shape=str(workload.shape), hardware=hardware)


def alike(one: Key, other: Key) -> bool:
    """Whether a step of one teaches something of the other: neighbours, and rows that differ by less than LIKE."""
    low, high = sorted((one.capacity, other.capacity))
    return high <= low + 1 or high + 1 <= LIKE * (low + 1)
