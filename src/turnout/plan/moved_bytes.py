"""Bytes that a block moves through device memory beside its products: norms, activations, casts, rows of experts."""

from turnout.plan.job import Job
from turnout.strategy import ELEMENT_BYTES

# rows read or written in another order reach less of the bandwidth than what lies in a row: 0.50 of 0.67 on B200
# (SimuMax 1.2, configs/system/b200_bf16_ceperm.json, permute and default)
SCATTERED = 0.666 / 0.5


def elementwise_bytes(job: Job, layer: int) -> float:
    """Bytes that norms, residuals, activations, rotations, casts and the permutation of rows move, forward."""
    shape, strategy, tokens = job.shape, job.strategy, job.rank_tokens
    sequence = strategy.tp if strategy.sequence_parallel else 1
    # per token: two norms (read, write) and two residual additions (read two, write one) of width dim
    residual = (2 * 2 + 2 * 3) * shape.dim / sequence
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim / strategy.tp
    inputs = 2 * shape.dim + shape.num_heads * shape.head_dim / strategy.tp
    return tokens * (2 * (residual + 2 * heads) + _cast_bytes(job) * inputs) + ffn_bytes(job, layer)


def ffn_bytes(job: Job, layer: int) -> float:
    """Of these, what is of the FFN or the experts alone."""
    shape, strategy = job.shape, job.strategy
    element = 2 * _inner_moves(job) + _cast_bytes(job)
    if not shape.experts_of(layer):
        return element * job.rank_tokens * shape.ffn_hidden / strategy.tp
    rows, width = job.routed_tokens * shape.top_k * job.padding * job.busiest, shape.latent_dim or shape.dim
    inner = job.rank_tokens * shape.shared_hidden / strategy.tp + job.expert_rows * shape.expert_hidden / strategy.etp
    # rows are gathered at the sender and added up there: each reads and writes
    return element * inner + rows * width * (SCATTERED * 2 * 2 * 2 + _cast_bytes(job))


def light_bytes(job: Job, layer: int) -> float:
    """Bytes that norms and gated activations move, forward: what light recomputation repeats beside products."""
    shape, strategy = job.shape, job.strategy
    sequence = strategy.tp if strategy.sequence_parallel else 1
    ffn = shape.shared_hidden if shape.experts_of(layer) else shape.ffn_hidden
    moved = 2 * job.rank_tokens * (2 * 2 * shape.dim / sequence + _inner_moves(job) * ffn / strategy.tp)
    if shape.experts_of(layer):
        moved += 2 * job.expert_rows * _inner_moves(job) * shape.expert_hidden / strategy.etp
    return moved


def accumulated_bytes(job: Job, layer: int) -> float:
    """Gradients of a block added to their fp32 accumulators: one read and one write a micro-batch."""
    dense = job.shape.block_params(layer) / job.strategy.tp
    routed = job.shape.routed_params(layer) * job.crowding / (job.strategy.ep * job.strategy.etp)
    return 2 * job.framework.gradient_bytes * (dense + routed)


def _cast_bytes(job: Job) -> float:
    """Moved to cast one element of a product's operand: read in two bytes and written twice, as is and transposed."""
    element = ELEMENT_BYTES[job.strategy.precision]
    return 2 + 2 * element if element < 2 else 0.0


def _inner_moves(job: Job) -> int:
    """Widths read and written between an FFN's matrices."""
    return 3 if job.shape.gated else 2
