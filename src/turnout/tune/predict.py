"""Seconds of a layer, forward and backward, under every choice: the planner's bytes on links that were measured.

The law of d chunks: of the exchange a share `busy` is the processor's own work, which grows with the messages and hides
behind nothing; the rest and the computation take the longer of both, and the first or last chunk of the shorter. All
chunks leave at once, so that what is no work of a message is waited for once. Weights are awaited first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from turnout.plan.collectives import Collective, chunked
from turnout.plan.expert_volume import exchange, expert_tensor_volume, expert_weights_volume
from turnout.plan.model import ModelShape
from turnout.plan.step import Step
from turnout.strategy import Strategy, legal_parts
from turnout.topology import Link
from turnout.tune.choice import Choice, LayerShape, Workload

CHUNKS = (1, 2, 4, 8)
PASSES = 3  # a backward pass computes twice what the forward one does


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of machine, as it was measured once."""

    name: str  # two runs with one name compare their times
    ranks: int
    local: int  # ranks of a node
    flops_per_s: float  # of a rank's matrix products
    intra: Link  # a rank to the others of its node
    inter: Link  # a rank to those of other nodes
    busy: float = 0.0  # share of an exchange in which the processor is at work: nothing computes behind that


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one layer, forward and backward, on the busiest rank."""

    compute_s: float
    exchange_s: float
    weights_s: float  # gathered, and their gradients' way back
    step_s: float


def candidates(shape: LayerShape, hardware: Hardware) -> tuple[Choice, ...]:
    """What can differ: every r, chunks where rows travel, and the programs that differ on this mesh."""
    return tuple(_candidates(shape, hardware))


def predictions(workload: Workload, hardware: Hardware, choices: Iterable[Choice] | None = None) -> dict[Choice, float]:
    """Seconds of a layer under each of `choices`; None: under every candidate."""
    asked = candidates(workload.shape, hardware) if choices is None else choices
    return {choice: predict(choice, workload, hardware).step_s for choice in asked}


def predict(choice: Choice, workload: Workload, hardware: Hardware) -> Prediction:
    """Seconds of a layer under one choice."""
    shape = workload.shape
    tokens = workload.capacity * shape.num_experts / hardware.ranks / shape.top_k
    rows, weights = _volumes(choice, shape, hardware.ranks, hardware.local)
    exchange_s = sum(_seconds(part, hardware, tokens) for part in rows)
    in_chunks_s = sum(_seconds(chunked(part, choice.overlap), hardware, tokens) for part in rows)
    weights_s = sum(_seconds(part, hardware) for part in weights)
    flops = 2 * PASSES * tokens * shape.top_k * (3 if shape.gated else 2) * shape.dim * shape.hidden
    compute_s = flops / hardware.flops_per_s
    if choice.adaptive_r:
        # one of a rank's experts is the busiest of all, the others are as others are; tokens that stay are everybody's
        skew = 1 + (workload.skew - 1) * shape.ep / shape.num_experts
        exchange_s, in_chunks_s, compute_s = exchange_s * skew, in_chunks_s * skew, compute_s * skew
    busy_s, waiting_s = hardware.busy * in_chunks_s, (1 - hardware.busy) * exchange_s
    overlapped_s = max(waiting_s, compute_s) + min(waiting_s, compute_s) / choice.overlap
    return Prediction(
        compute_s=compute_s, exchange_s=exchange_s, weights_s=weights_s, step_s=weights_s + busy_s + overlapped_s
    )


def _candidates(shape: LayerShape, hardware: Hardware) -> Iterator[Choice]:
    yield Choice(adaptive_r=0, overlap=1, alltoall="flat")
    for parts in legal_parts(shape.etp)[1:]:
        # whole experts that no other rank has: with r = 0 their rows need not be counted
        if parts == 1 and shape.ep == 1:
            continue
        for program, chunks in product(_programs(shape, hardware), CHUNKS):
            yield Choice(adaptive_r=parts, overlap=chunks, alltoall=program)


def _programs(shape: LayerShape, hardware: Hardware) -> Iterator[str]:
    local = min(shape.ep, max(1, hardware.local // shape.etp))
    across, merges = shape.ep > local > 1, shape.top_k > 1
    yield "flat"
    if across:
        yield "hierarchical"
    if across and merges:
        yield "node_dedup"
    if merges and shape.num_experts > shape.ep > 1:
        yield "rank_dedup"


def _seconds(part: Collective, hardware: Hardware, size: float = 1.0) -> float:
    """Of `size` times the bytes: what leaves the node and what stays travel at once."""
    return max(
        hardware.intra.time_s(size * part.intra_bytes, part.intra_messages),
        hardware.inter.time_s(size * part.inter_bytes, part.inter_messages),
    )


@lru_cache(maxsize=4096)
def _volumes(
    choice: Choice, shape: LayerShape, ranks: int, local: int
) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
    """What a layer sends of the rows of one token a rank, and of its weights; both passes."""
    layout = Strategy(
        ep=shape.ep,
        etp=shape.etp,
        adaptive_r=choice.adaptive_r,
        alltoall=choice.alltoall,
        # only the bytes of an element matter here
        precision="bf16" if shape.element_bytes == 2 else "fp32",
    ).check(ranks, num_experts=shape.num_experts)
    model = ModelShape(
        num_layers=1, dim=shape.dim, vocab_size=1, num_heads=1, num_kv_heads=1, head_dim=1,
        num_experts=shape.num_experts, top_k=shape.top_k, expert_hidden=shape.hidden, gated=shape.gated,
    )  # fmt: skip
    step = Step(shape=model, strategy=layout, devices_per_node=local, tokens=1.0, micro_batches=1)
    passed, _ = exchange(step, shape.num_experts)
    rows = [passed, *expert_tensor_volume(step, shape.num_experts)]
    weights = expert_weights_volume(step, shape.num_experts)
    return tuple(rows), tuple(weights)
