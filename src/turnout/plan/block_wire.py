"""Seconds on the wire of one block, or of the ends of a stage, for one micro-batch: terms of the step's time.

What is sent is `volume`'s, asked for one block and one micro-batch at a time; what it takes is the cluster's.
"""

from dataclasses import dataclass

from turnout.plan.expert_volume import exchange, expert_tensor_volume, expert_weights_volume
from turnout.plan.terms import Numbers, reads
from turnout.plan.volume import context_volume, embedding_volume, pipeline_volume, tensor_volume
from turnout.plan.wire import Run, Wire, bare_stage, sum_s, wire_of


@reads("tp", "sequence_parallel", "tokens", "recompute", "etp", "alltoall")
def tensor_s(run: Run, block: int) -> float:
    """Sums and gathers of one block over tensor-parallel ranks."""
    return sum_s(tensor_volume(run.block(block)), run.cluster)


@reads("tp", "cp", "tokens", "recompute")
def context_s(run: Run, block: int) -> float:
    """Keys and values of one block round the context-parallel ranks."""
    return sum_s(context_volume(run.block(block)), run.cluster)


@reads("tp", "sequence_parallel", "ep", "etp", "folded", "alltoall", "dispatch_precision", "adaptive_r")
def exchange_wire(run: Run, block: int, again: bool) -> Wire:
    """The all-to-all of one block for one token a rank; `again`: what full recomputation sends once more."""
    passed, repeated = exchange(run.step(bare_stage(layers=(block,)), 1.0), run.job.shape.experts_of(block))
    return wire_of(repeated if again else passed, run.cluster)


@reads("tp", "sequence_parallel", "tokens", "recompute", "etp", "adaptive_r")
def expert_tensor_s(run: Run, block: int) -> float:
    """Rows of one block among the ranks that share an expert."""
    return sum_s(expert_tensor_volume(run.block(block), run.job.shape.experts_of(block)), run.cluster)


@reads("recompute", "ep", "etp", "adaptive_r")
def expert_weights_s(run: Run, block: int) -> float:
    """Weights of one block's experts that are gathered, and the sums of their gradients."""
    return sum_s(expert_weights_volume(run.block(block), run.job.shape.experts_of(block)), run.cluster)


@reads("tp", "sequence_parallel", "tokens")
def table_s(run: Run) -> float:
    """Sums and gathers at the embedding, or at one output matrix."""
    return sum_s(embedding_volume(run.step(bare_stage(embedding=True), run.job.rank_tokens)), run.cluster)


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Between the stages of a pipeline, of one micro-batch."""

    pp_s: Numbers  # sends
    tp_s: Numbers  # gathers of what was sent in shares


@reads("tp", "sequence_parallel", "tokens", "pp", "virtual_stages")
def boundary(run: Run) -> Boundary:
    """Sends of an inner stage, and gathers after them."""
    parts = list(pipeline_volume(run.step(bare_stage(), run.job.rank_tokens)))
    pp, tp = (sum_s([part for part in parts if part.axis == axis], run.cluster) for axis in ("pp", "tp"))
    return Boundary(pp_s=pp, tp_s=tp)
