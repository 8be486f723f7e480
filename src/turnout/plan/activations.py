"""Bytes of one micro-batch on one rank that one block, the output matrix or a gather keeps: terms of memory.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4 (equations 1-6), extended from widths of one h to grouped
queries, latent attention, gated FFNs and experts.
"""

from dataclasses import dataclass

from turnout.plan.job import Job
from turnout.plan.terms import Numbers, reads


@dataclass(frozen=True, kw_only=True)
class KeptBytes:
    """What one block keeps for one micro-batch; under full recomputation, while it is redone."""

    dense_bytes: Numbers
    routed_bytes: Numbers  # rows of routed experts

    @property
    def total_bytes(self) -> Numbers:
        return self.dense_bytes + self.routed_bytes


@dataclass(frozen=True, kw_only=True)
class GatheredBytes:
    """What gathers over tensor-parallel ranks hold."""

    buffer_bytes: Numbers  # kept from step to step
    block_bytes: Numbers  # of the block at work: inputs of products, gathered, and outputs not summed yet


KEPT_BYTES = {"": 2.0, "fp8": 1 + 4 / 128}  # of an element kept for backward, its scale included
# of an element of attention's output under fp8: E5M6, for its own backward pass needs it too; arXiv:2412.19437, 3.3.3
ATTENTION_OUTPUT_BYTES = {"": 2.0, "fp8": 1.5}


@reads("tp", "sequence_parallel", "tokens", "recompute", "ep", "etp")
def block_bytes(job: Job, block: int) -> KeptBytes:
    """Bytes that one block keeps for one micro-batch."""
    experts, shape = job.shape.experts_of(block), job.shape
    if job.strategy.recompute == "selective" and job.framework.selective == "products":
        routed = _routed_bytes(job, block) / 2 if experts else 0.0
        return KeptBytes(dense_bytes=_product_bytes(job, block), routed_bytes=routed)
    if job.strategy.recompute == "light":
        routed = _light_routed_bytes(job, block) if experts else 0.0
        return KeptBytes(
            dense_bytes=_light_bytes(job, shape.shared_hidden if experts else shape.ffn_hidden), routed_bytes=routed
        )
    dense = _residual_bytes(job) + _attention_bytes(job)
    dense += _ffn_bytes(job, shape.shared_hidden if experts else shape.ffn_hidden)
    return KeptBytes(dense_bytes=dense, routed_bytes=_routed_bytes(job, block) if experts else 0.0)


@reads("tp", "sequence_parallel", "tokens")
def input_bytes(job: Job) -> float:
    """Bytes of the residual stream of one micro-batch on one rank: the input of a block."""
    width = job.rank_tokens * job.shape.dim * job.strategy.activation_bytes
    return width / (job.strategy.tp if job.strategy.sequence_parallel else 1)


@reads("tp", "tokens")
def logit_bytes(job: Job) -> float:
    """Bytes of the logits of one micro-batch, and of what is made of them for the loss."""
    heads = 1 + job.shape.mtp_layers
    return heads * job.rank_tokens * job.shape.vocab_size * job.framework.logit_bytes / job.strategy.tp


@reads("tp", "tokens")
def gathered_bytes(job: Job) -> GatheredBytes:
    """Bytes of one micro-batch that gathers over tensor-parallel ranks hold."""
    if job.strategy.tp == 1:
        return GatheredBytes(buffer_bytes=0.0, block_bytes=0.0)
    width, framework = job.rank_tokens * job.shape.dim, job.framework
    inputs = width * 2 * job.strategy.activation_bytes
    return GatheredBytes(
        buffer_bytes=width * framework.gather_buffer_bytes,
        block_bytes=2 * inputs if framework.gathered_inputs else 0.0,
    )


def _residual_bytes(job: Job) -> float:
    """Inputs and outputs of the two norms, and dropout masks: what sequence parallelism alone shards."""
    shape, strategy = job.shape, job.strategy
    a, tp = strategy.activation_bytes, strategy.tp
    norms = 2 * a * shape.dim
    masks = 2 * shape.dim if job.framework.dropout else 0
    # the normed inputs of the two column-parallel products
    inputs = 2 * a * shape.dim
    return job.rank_tokens * (norms + masks + inputs) / (tp if strategy.sequence_parallel else 1)


def _attention_bytes(job: Job) -> float:
    shape, strategy = job.shape, job.strategy
    a, heads = strategy.activation_bytes, shape.num_heads
    if shape.mla is None:
        width = 2 * heads * shape.head_dim + 2 * shape.num_kv_heads * shape.head_dim
    else:
        m = shape.mla
        width = heads * (2 * (m.nope_dim + m.rope_dim) + 2 * m.v_dim)
    shared = 0 if shape.mla is None else 2 * shape.mla.q_rank + 2 * shape.mla.kv_rank + shape.mla.rope_dim
    # of every score: before and after softmax, and a dropout mask (equation 2); kept unless recomputed or flash
    kept_scores = not job.framework.flash_attention and strategy.recompute == "none"
    scores = (2 * a + 1) * heads * job.seq_len if kept_scores else 0
    copies = job.framework.key_copies * 2 * a * shape.num_kv_heads * shape.head_dim
    kept = a * width + copies + scores
    # the narrow latent vectors are computed on every tensor-parallel rank
    return job.rank_tokens * (kept / strategy.tp + a * shared)


def _ffn_bytes(job: Job, hidden: int) -> float:
    return job.rank_tokens * job.strategy.activation_bytes * _inner_widths(job) * hidden / job.strategy.tp


def _inner_widths(job: Job) -> int:
    """Hidden widths kept between an FFN's matrices: up (and gate), and their product."""
    if not job.shape.gated:
        return 2
    return 3 if job.framework.fused_activation else 4


def _product_bytes(job: Job, layer: int) -> float:
    """Kept when only every second matrix product is: the block's input, attention's output, half of the products.

    Source: torchtitan, selective activation checkpointing of operators (attention kept, every second product dropped).
    """
    shape, strategy = job.shape, job.strategy
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden = shape.shared_hidden if shape.experts_of(layer) else shape.ffn_hidden
    products = heads + 2 * kv_heads + 2 * shape.dim + (2 if shape.gated else 1) * hidden
    sharded = heads + products / 2 + (shape.dim if strategy.sequence_parallel else shape.dim * strategy.tp)
    return job.rank_tokens * strategy.activation_bytes * sharded / strategy.tp


def _light_bytes(job: Job, hidden: int) -> float:
    """Kept when norms, up-projections and gated activations are computed again: inputs of the norms, what heads are
    projected from, attention's output and its sums of exponentials, inputs of the gated activation.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, sections 3.2.3 (what is computed again) and 3.3.3 (fp8 caches).
    """
    shape, strategy = job.shape, job.strategy
    element, heads = KEPT_BYTES[strategy.kept_precision], shape.num_heads
    norms = 2 * strategy.activation_bytes * shape.dim / (strategy.tp if strategy.sequence_parallel else 1)
    if shape.mla is None:
        inputs = element * (heads + 2 * shape.num_kv_heads) * shape.head_dim / strategy.tp
        output = heads * shape.head_dim
    else:
        # narrow vectors are on every tensor-parallel rank
        inputs = element * (shape.mla.q_rank + shape.mla.kv_rank + shape.mla.rope_dim)
        output = heads * shape.mla.v_dim
    attention = (ATTENTION_OUTPUT_BYTES[strategy.kept_precision] * output + 4 * heads) / strategy.tp
    ffn = element * (2 if shape.gated else 1) * hidden / strategy.tp
    return job.rank_tokens * (norms + inputs + attention + ffn)


def _light_routed_bytes(job: Job, layer: int) -> float:
    """Rows of the busiest expert rank as received, and the inputs of their gated activation."""
    shape, strategy = job.shape, job.strategy
    element, width = KEPT_BYTES[strategy.kept_precision], shape.latent_dim or shape.dim
    rows, inner = job.expert_rows, (2 if shape.gated else 1) * shape.expert_hidden / strategy.etp
    copies = strategy.activation_bytes * job.framework.permuted_copies * width
    router = 8 * shape.experts_of(layer) * job.routed_tokens
    return rows * (element * width + copies + element * inner) + router


def _routed_bytes(job: Job, layer: int) -> float:
    """Rows of the busiest expert rank: as received, between the matrices, and as kept for the weighted sum."""
    shape, strategy = job.shape, job.strategy
    a, width = strategy.activation_bytes, shape.latent_dim or shape.dim
    # every rank of an expert's tensor group has all of the group's rows, and 1/etp of what lies between its matrices
    copies = 1 + job.framework.permuted_copies
    inner = _inner_widths(job) * shape.expert_hidden / strategy.etp
    router = 8 * shape.experts_of(layer) * job.routed_tokens
    return job.expert_rows * a * (copies * width + inner) + router
