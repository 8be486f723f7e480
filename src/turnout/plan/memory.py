"""Bytes of device memory a training job needs, by pipeline stage and by what needs them.

Source of the activation terms: Korthikanti et al. 2022, arXiv:2205.05198, section 4 (equations 1-6), extended from
widths of one h to grouped queries, latent attention, gated FFNs and experts.
"""

from dataclasses import dataclass, fields

from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.pipeline import Stage, layers_in_flight, stages

GIB = 2**30
# of the CUDA context and the communication library's buffers, outside any allocator; specs/planner.md: 1-3 GB
CONTEXT_BYTES = 1.5 * GIB
# of the matrix library, two streams of 32 MiB each on Hopper: PyTorch's default CUBLAS_WORKSPACE_CONFIG
WORKSPACE_BYTES = 2 * 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes on one rank of a pipeline stage."""

    stage: int
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float  # kept for backward, expert buffers apart
    moe_bytes: float  # routed rows: as dispatched, between an expert's matrices, as returned
    logits_bytes: float
    buffer_bytes: float  # kept for good: the matrix library's workspace, buffers of gathers
    framework_bytes: float  # gradients not yet accumulated, gathered parameters, allocator slack

    @property
    def allocated_bytes(self) -> float:
        """What the framework allocates at its peak; compare with max_memory_allocated or reserved."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "stage")

    @property
    def model_bytes(self) -> float:
        """What stays between steps: weights, gradients, optimizer."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def resting_bytes(self) -> float:
        """What is allocated between steps."""
        return self.model_bytes + self.buffer_bytes

    def fits(self, device_bytes: float) -> bool:
        """Whether a device of this memory (as the data sheet counts) holds it beside its context."""
        return self.allocated_bytes + CONTEXT_BYTES <= device_bytes


def memory(job: Job) -> Memory:
    """Memory of the pipeline stage that needs most."""
    return max(memory_by_stage(job), key=lambda stage: stage.allocated_bytes)


def memory_by_stage(job: Job) -> tuple[Memory, ...]:
    """Peak memory of one rank of each pipeline stage."""
    strategy = job.strategy
    cut = stages(job.shape, strategy.pp, strategy.virtual_stages, job.framework.stage_balance)
    return tuple(_stage_memory(job, stage) for stage in cut)


def _stage_memory(job: Job, stage: Stage) -> Memory:
    weights, gradients, optimizer = _model_bytes(job, stage)
    activations, moe = _activation_bytes(job, stage)
    logits = _logit_bytes(job) if stage.head else 0.0
    live = weights + gradients + optimizer + activations + moe + logits
    buffers = WORKSPACE_BYTES + _buffer_bytes(job)
    framework = _unaccumulated_bytes(job, stage) + _gathered_bytes(job, stage) + _gathered_input_bytes(job, stage)
    return Memory(
        stage=stage.index,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        moe_bytes=moe,
        logits_bytes=logits,
        buffer_bytes=buffers,
        framework_bytes=framework + job.framework.slack * (live + framework),
    )


# --- parameters ---


def stage_params(shape: ModelShape, stage: Stage) -> tuple[int, int]:
    """(parameters every token meets, parameters of routed experts) of a stage, before any sharding."""
    dense = sum(map(shape.block_params, stage.layers))
    routed = sum(map(shape.routed_params, stage.layers))
    if stage.embedding:
        dense += shape.embedding_params
    if stage.head:
        dense += shape.dim + shape.mtp_layers * shape.mtp_params
        routed += shape.mtp_layers * shape.routed_params(shape.all_layers - 1)
        # a tied output matrix on another stage than the embedding is a copy of it
        dense += shape.vocab_size * shape.dim if not shape.tied_embeddings or not stage.embedding else 0
    return dense, routed


def rank_params(job: Job, stage: Stage) -> tuple[float, float]:
    """(dense, routed) parameters of one rank of a stage before ZeRO."""
    dense, routed = stage_params(job.shape, stage)
    return dense / job.strategy.tp, routed / (job.strategy.ep * job.strategy.etp)


def _model_bytes(job: Job, stage: Stage) -> tuple[float, float, float]:
    strategy, framework = job.strategy, job.framework
    totals = [0.0, 0.0, 0.0]
    dense_ranks = strategy.zero_size or strategy.dp * strategy.cp
    for params, ranks in zip(rank_params(job, stage), (dense_ranks, strategy.edp()), strict=True):
        weights, gradients = framework.weight_bytes, framework.gradient_bytes
        optimizer = framework.optimizer_bytes
        if strategy.schedule == "dualpipe":
            weights *= 2
        if strategy.zero >= 1:
            optimizer = (optimizer + framework.zero_shard_bytes) / ranks + framework.zero_kept_bytes
        gradients = gradients / (ranks if strategy.zero >= 2 else 1)
        gradients += framework.data_parallel_bytes if ranks > 1 else 0
        weights /= ranks if strategy.zero >= 3 else 1
        totals = [total + params * each for total, each in zip(totals, (weights, gradients, optimizer), strict=True)]
    return totals[0], totals[1], totals[2]


def _unaccumulated_bytes(job: Job, stage: Stage) -> float:
    """Gradients of the largest matrices in the moment before they join the accumulated ones."""
    shape, tp = job.shape, job.strategy.tp
    vocab = shape.vocab_size * shape.dim * (stage.embedding + stage.head)
    widest = max((_widest_matrix(shape, layer) for layer in stage.layers), default=0)
    return job.framework.wgrad_bytes * (vocab + widest) / tp


def _widest_matrix(shape: ModelShape, layer: int) -> int:
    hidden = shape.shared_hidden if shape.experts_of(layer) else shape.ffn_hidden
    return shape.dim * hidden * (2 if shape.gated else 1)


def _gathered_bytes(job: Job, stage: Stage) -> float:
    """Under ZeRO-3: parameters of two layers, gathered in the computing precision, and the gradients of one."""
    if job.strategy.zero < 3:
        return 0.0
    shape, strategy = job.shape, job.strategy
    if strategy.pp > 1 and not job.framework.reshards:
        return sum(rank_params(job, stage)) * (strategy.activation_bytes + job.framework.gradient_bytes)
    layer = max((shape.block_params(i) / strategy.tp + _expert_share(job, i) for i in stage.layers), default=0.0)
    vocab = shape.vocab_size * shape.dim / strategy.tp
    return strategy.activation_bytes * max(2 * layer, layer + vocab) + strategy.activation_bytes * max(layer, vocab)


def _buffer_bytes(job: Job) -> float:
    """Buffers of all-gathers that are kept from step to step."""
    if job.strategy.tp == 1:
        return 0.0
    return job.rank_tokens * job.shape.dim * job.framework.gather_buffer_bytes


def _gathered_input_bytes(job: Job, stage: Stage) -> float:
    """Inputs of column-parallel products, held gathered instead of sharded, of one micro-batch."""
    if job.strategy.tp == 1 or not job.framework.gathered_inputs:
        return 0.0
    return job.rank_tokens * job.shape.dim * 2 * job.strategy.activation_bytes * len(stage.layers)


def _expert_share(job: Job, layer: int) -> float:
    return job.shape.routed_params(layer) / (job.strategy.ep * job.strategy.etp)


# --- activations ---


def _activation_bytes(job: Job, stage: Stage) -> tuple[float, float]:
    """(dense, routed) bytes kept for backward at the peak of a stage."""
    if not stage.layers:
        return 0.0, 0.0
    passes = layers_in_flight(stage, job.strategy, job.micro_batches) / len(stage.layers)
    kept = [layer_bytes(job, layer) for layer in stage.layers]
    if job.strategy.recompute == "full":
        inputs = passes * len(stage.layers) * layer_input_bytes(job)
        dense, moe = max(kept, key=sum)
        return inputs + dense, moe
    dense, moe = passes * sum(d for d, _ in kept), passes * sum(m for _, m in kept)
    return dense, moe


def layer_input_bytes(job: Job) -> float:
    """Bytes of the residual stream of one micro-batch on one rank."""
    width = job.rank_tokens * job.shape.dim * job.strategy.activation_bytes
    return width / (job.strategy.tp if job.strategy.sequence_parallel else 1)


def layer_bytes(job: Job, layer: int) -> tuple[float, float]:
    """(dense, routed) bytes that one block keeps for one micro-batch; under full recomputation, while it is redone."""
    if job.strategy.recompute == "selective" and job.framework.selective == "products":
        return _product_bytes(job, layer), _routed_bytes(job, layer) / 2 if job.shape.experts_of(layer) else 0.0
    attention = _residual_bytes(job) + _attention_bytes(job)
    if job.shape.experts_of(layer):
        return attention + _ffn_bytes(job, job.shape.shared_hidden), _routed_bytes(job, layer)
    return attention + _ffn_bytes(job, job.shape.ffn_hidden), 0.0


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
    turned = job.framework.rotary_bytes * (heads + shape.num_kv_heads) * shape.head_dim
    kept = a * width + turned + scores
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


def _routed_bytes(job: Job, layer: int) -> float:
    """Rows of the busiest expert rank: as received, between the matrices, and as kept for the weighted sum."""
    shape, strategy = job.shape, job.strategy
    a, width = strategy.activation_bytes, shape.latent_dim or shape.dim
    # every rank of an expert's tensor group has all of the group's rows, and 1/etp of their width
    rows = job.routed_tokens * shape.top_k * job.skew
    copies = 1 + job.framework.permuted_copies
    inner = _inner_widths(job) * shape.expert_hidden
    router = 8 * shape.experts_of(layer) * job.routed_tokens
    return rows * strategy.etp * a * copies * width + rows * a * inner + router


def _logit_bytes(job: Job) -> float:
    heads = 1 + job.shape.mtp_layers
    return heads * job.rank_tokens * job.shape.vocab_size * job.framework.logit_bytes / job.strategy.tp
