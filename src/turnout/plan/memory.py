"""Bytes of device memory a training job needs, by pipeline stage and by what needs them.

Parameters by ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; activations: see `activations`.
"""

from dataclasses import dataclass, fields

from turnout.plan.activations import GatheredBytes, KeptBytes, block_bytes, gathered_bytes, input_bytes, logit_bytes
from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.pipeline import Stage, layers_in_flight, rank_kinds, stages
from turnout.plan.terms import Numbers, One, Terms, either, larger, reads

GIB = 2**30
# of the CUDA context and the communication library's buffers, outside any allocator; assumed: no source splits it off
CONTEXT_BYTES = 1.5 * GIB
# share of what is allocated that PyTorch's caching allocator holds beyond it, in pieces that nothing fits: the middle
# of the 3 to 6 % that are seen
ALLOCATOR_SLACK = 0.045
# of the matrix library, two streams of 32 MiB each on Hopper: PyTorch's default CUBLAS_WORKSPACE_CONFIG
WORKSPACE_BYTES = 2 * 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes on one rank of a pipeline stage."""

    stage: int
    weights_bytes: Numbers
    gradients_bytes: Numbers
    optimizer_bytes: Numbers
    activations_bytes: Numbers  # kept for backward, expert buffers apart
    moe_bytes: Numbers  # routed rows: as dispatched, between an expert's matrices, as returned
    logits_bytes: Numbers
    between_bytes: Numbers  # of the optimizer between steps, given back before the peak
    buffer_bytes: Numbers  # kept for good: the matrix library's workspace, buffers of gathers
    framework_bytes: Numbers  # gradients not yet accumulated, gathered parameters

    @property
    def allocated_bytes(self) -> Numbers:
        """What the framework allocates at its peak; compare with max_memory_allocated."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name not in ("stage", "between_bytes"))

    @property
    def model_bytes(self) -> Numbers:
        """What stays between steps: weights, gradients, optimizer."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def resting_bytes(self) -> Numbers:
        """What is allocated between steps."""
        return self.model_bytes + self.between_bytes + self.buffer_bytes

    @property
    def reserved_bytes(self) -> Numbers:
        """What PyTorch's allocator holds from the device for it; compare with max_memory_reserved."""
        return self.allocated_bytes * (1 + ALLOCATOR_SLACK)

    def fits(self, device_bytes: float) -> bool:
        """Whether a device of this memory (as the data sheet counts) holds it with what lies beside it."""
        return self.allocated_bytes + beside_bytes(self.allocated_bytes) <= device_bytes


def beside_bytes(allocated: Numbers) -> Numbers:
    """What a device holds beside `allocated` bytes: the context, and what the allocator cannot use."""
    return CONTEXT_BYTES + ALLOCATOR_SLACK * allocated


# how the parts of two stages on one rank add up
_HELD_FOR_GOOD = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "between_bytes")
_IN_FLIGHT = ("activations_bytes", "moe_bytes")
_ONE_AT_A_TIME = ("logits_bytes", "buffer_bytes", "framework_bytes")


def memory(job: Job) -> Memory:
    """Memory of the pipeline stage that needs most."""
    of = One(job)
    return max((rank_memory(of, *held) for held in _ranks(job)), key=lambda rank: rank.allocated_bytes)


def memory_by_stage(job: Job) -> tuple[Memory, ...]:
    """Peak memory of one rank of each pipeline stage."""
    of, strategy = One(job), job.strategy
    cut = stages(job.shape, strategy.pp, strategy.virtual_stages, job.framework.stage_balance)
    mirrors = cut[::-1] if strategy.schedule == "dualpipe" else (None,) * len(cut)
    return tuple(rank_memory(of, stage, mirror) for stage, mirror in zip(cut, mirrors, strict=True))


def allocated_bytes(of: Terms[Job]) -> Numbers:
    """Peak bytes of the stage that needs most, layouts of one pipeline at a time."""
    most: Numbers = 0.0
    for held in _ranks(of.subject):
        most = larger(most, rank_memory(of, *held).allocated_bytes)
    return most


def _ranks(job: Job) -> list[tuple[Stage, Stage | None]]:
    """What the ranks of a pipeline that differ hold."""
    strategy = job.strategy
    kinds = rank_kinds(
        job.shape, strategy.pp, strategy.virtual_stages, job.framework.stage_balance,
        both_ways=strategy.schedule == "dualpipe",
    )  # fmt: skip
    return [(stage, mirror) for stage, mirror, _ in kinds]


def rank_memory(of: Terms[Job], stage: Stage, mirror: Stage | None) -> Memory:
    """Peak memory of a rank that holds `stage`, and `mirror` beside it where a pipeline is fed from both ends.

    Half of the micro-batches in flight are in either stage; what is there for one micro-batch at a time is there once.
    """
    one = stage_memory(of, stage)
    if mirror is None:
        return one
    other = stage_memory(of, mirror)
    both = {name: getattr(one, name) + getattr(other, name) for name in _HELD_FOR_GOOD}
    halves = {name: (getattr(one, name) + getattr(other, name)) / 2 for name in _IN_FLIGHT}
    once = {name: larger(getattr(one, name), getattr(other, name)) for name in _ONE_AT_A_TIME}
    return Memory(stage=stage.index, **both, **halves, **once)


def stage_memory(of: Terms[Job], stage: Stage) -> Memory:
    """Peak memory of one rank of a pipeline stage."""
    weights, gradients, optimizer, between = _model_bytes(of, stage)
    activations, moe = _activation_bytes(of, stage)
    logits = of(logit_bytes) if stage.head else 0.0
    gathered: GatheredBytes = of(gathered_bytes)
    framework = of(unaccumulated_bytes) * _widest(of.subject.shape, stage) + _gathered_params_bytes(of, stage)
    framework = framework + gathered.block_bytes
    return Memory(
        stage=stage.index,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        moe_bytes=moe,
        logits_bytes=logits,
        between_bytes=between,
        buffer_bytes=WORKSPACE_BYTES + gathered.buffer_bytes,
        framework_bytes=framework,
    )


# --- parameters ---


def stage_params(shape: ModelShape, stage: Stage) -> tuple[int, int]:
    """(parameters every token meets, parameters of routed experts) of a stage, before any sharding."""
    dense = sum(number * shape.block_params(block) for block, number in stage.blocks)
    routed = sum(number * shape.routed_params(block) for block, number in stage.blocks)
    if stage.embedding:
        dense += shape.embedding_params
    if stage.head:
        dense += shape.dim + shape.mtp_layers * shape.mtp_params
        routed += shape.mtp_layers * shape.routed_params(shape.all_layers - 1)
        # a tied output matrix on another stage than the embedding is a copy of it
        dense += shape.vocab_size * shape.dim if not shape.tied_embeddings or not stage.embedding else 0
    return dense, routed


def rank_params(of: Terms[Job], stage: Stage) -> tuple[Numbers, Numbers]:
    """(dense, routed) parameters of one rank of a stage before ZeRO."""
    dense, routed = stage_params(of.subject.shape, stage)
    # every sparse layer has as many copies, however many experts
    copied = of.subject.shape.expert_params * sum(
        number for block, number in stage.blocks if of.subject.shape.experts_of(block)
    )
    return dense / of(tensor_ranks), routed / of(expert_ranks) + copied * of(copies_of_rank)


@reads("tp")
def tensor_ranks(job: Job) -> int:
    """Ranks that share a dense matrix."""
    return job.strategy.tp


@reads("ep", "etp")
def expert_ranks(job: Job) -> float:
    """Ranks that would share the experts of a layer if all held as many as the fullest."""
    return job.strategy.ep * job.strategy.etp / job.crowding


@reads("ep", "etp", "expert_copies")
def copies_of_rank(job: Job) -> float:
    """Copies of experts that a rank holds in a layer, or parts of them."""
    return job.strategy.expert_copies / (job.strategy.ep * job.strategy.etp)


@dataclass(frozen=True, kw_only=True)
class ParameterBytes:
    """Bytes of one parameter of a rank."""

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    between_bytes: float


@reads("zero", "zero_sum", "schedule", "tp", "pp")
def dense_parameter_bytes(job: Job) -> ParameterBytes:
    """Of what every token meets; ZeRO shards it over data and context parallel ranks."""
    return _parameter_bytes(job, job.strategy.zero_size or job.strategy.dp * job.strategy.cp)


@reads("zero", "zero_sum", "schedule", "pp", "ep", "etp")
def routed_parameter_bytes(job: Job) -> ParameterBytes:
    """Of routed experts; ZeRO shards it over the copies of an expert."""
    return _parameter_bytes(job, job.strategy.edp())


def _parameter_bytes(job: Job, ranks: int) -> ParameterBytes:
    strategy, framework = job.strategy, job.framework
    weights, gradients, optimizer = framework.weight_bytes, framework.gradient_bytes, framework.optimizer_bytes
    if strategy.schedule == "dualpipe":
        ranks *= 2  # every stage is on two ranks of a pipeline
    if strategy.zero >= 1:
        optimizer = (optimizer + framework.zero_shard_bytes) / ranks
    gradients = gradients / (ranks if strategy.zero >= 2 and strategy.zero_sum == "micro_batch" else 1)
    gradients += framework.data_parallel_bytes if ranks > 1 and strategy.zero == 0 else 0
    weights /= ranks if strategy.zero >= 3 else 1
    return ParameterBytes(
        weight_bytes=weights, gradient_bytes=gradients, optimizer_bytes=optimizer,
        between_bytes=framework.zero_kept_bytes if strategy.zero >= 1 else 0.0,
    )  # fmt: skip


def _model_bytes(of: Terms[Job], stage: Stage) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    params, routed_params = rank_params(of, stage)
    one: ParameterBytes = of(dense_parameter_bytes)
    routed: ParameterBytes = of(routed_parameter_bytes)
    return (
        params * one.weight_bytes + routed_params * routed.weight_bytes,
        params * one.gradient_bytes + routed_params * routed.gradient_bytes,
        params * one.optimizer_bytes + routed_params * routed.optimizer_bytes,
        params * one.between_bytes + routed_params * routed.between_bytes,
    )


@reads("tp")
def unaccumulated_bytes(job: Job) -> float:
    """Gradient of one parameter of the widest matrices in the moment before it joins the accumulated one."""
    return job.framework.wgrad_bytes / job.strategy.tp


def _widest(shape: ModelShape, stage: Stage) -> int:
    """Parameters of the tables and of the widest FFN matrix of a stage."""
    vocab = shape.vocab_size * shape.dim * (stage.embedding + stage.head)
    hidden = [shape.shared_hidden if shape.experts_of(block) else shape.ffn_hidden for block, _ in stage.blocks]
    return vocab + shape.dim * max(hidden, default=0) * (2 if shape.gated else 1)


@reads("zero")
def shards_parameters(job: Job) -> bool:
    """Whether parameters are gathered for use."""
    return job.strategy.zero == 3


@reads("tp", "ep", "etp", "expert_copies")
def block_params(job: Job, block: int) -> float:
    """Parameters of one rank of a block, experts included, before ZeRO."""
    strategy, shape = job.strategy, job.shape
    copied = shape.expert_params * copies_of_rank(job) if shape.experts_of(block) else 0.0
    return shape.block_params(block) / strategy.tp + shape.routed_params(block) / expert_ranks(job) + copied


def _gathered_params_bytes(of: Terms[Job], stage: Stage) -> Numbers:
    """Under ZeRO-3: parameters of two layers, gathered in the computing precision, and the gradients of one."""
    job = of.subject
    element, shape = job.strategy.activation_bytes, job.shape
    if job.strategy.pp > 1 and not job.framework.reshards:
        dense, routed = rank_params(of, stage)
        return either(of(shards_parameters), (dense + routed) * (element + job.framework.gradient_bytes), 0.0)
    layer: Numbers = 0.0
    for block, _ in stage.blocks:
        layer = larger(layer, of(block_params, block))
    vocab = shape.vocab_size * shape.dim / of(tensor_ranks)
    gathered = element * (larger(2 * layer, layer + vocab) + larger(layer, vocab))
    return either(of(shards_parameters), gathered, 0.0)


# --- activations ---


@reads("recompute")
def recomputes_all(job: Job) -> bool:
    """Whether a block keeps its input alone."""
    return job.strategy.recompute == "full"


@reads("micro_batches")
def micro_batches(job: Job) -> int:
    """Micro-batches of a step."""
    return job.micro_batches


def _activation_bytes(of: Terms[Job], stage: Stage) -> tuple[Numbers, Numbers]:
    """(dense, routed) bytes kept for backward at the peak of a stage."""
    if not stage.layers:
        return 0.0, 0.0
    passes = layers_in_flight(stage, of.subject.strategy, of(micro_batches)) / len(stage.layers)
    kept: list[tuple[KeptBytes, int]] = [(of(block_bytes, block), number) for block, number in stage.blocks]
    dense = passes * sum(number * each.dense_bytes for each, number in kept)
    routed = passes * sum(number * each.routed_bytes for each, number in kept)
    # of one block at a time all is there again
    once = kept[0][0]
    for each, _ in kept[1:]:
        once = either(each.total_bytes > once.total_bytes, each, once)
    full = of(recomputes_all)
    inputs = passes * len(stage.layers) * of(input_bytes)
    return either(full, inputs + once.dense_bytes, dense), either(full, once.routed_bytes, routed)
