"""Bytes of device memory a training job needs, by pipeline stage and by what needs them.

What is kept of parameters: see `parameter_bytes`; of activations: `activations`.
"""

from dataclasses import dataclass, fields

from turnout.plan.activations import GatheredBytes, KeptBytes, block_bytes, gathered_bytes, input_bytes, logit_bytes
from turnout.plan.job import Job
from turnout.plan.parameter_bytes import gathered_params_bytes, model_bytes, moment_bytes
from turnout.plan.pipeline import Stage, layers_in_flight, like_blocks, rank_kinds, stages
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
    weights, gradients, optimizer, between = model_bytes(of, stage)
    activations, moe = _activation_bytes(of, stage)
    logits = of(logit_bytes) if stage.head else 0.0
    gathered: GatheredBytes = of(gathered_bytes)
    framework = moment_bytes(of, stage) + gathered_params_bytes(of, stage) + gathered.block_bytes
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
    shape, strategy = of.subject.shape, of.subject.strategy
    passes = layers_in_flight(stage, strategy, of(micro_batches)) / max(1, len(stage.layers))
    kept: list[tuple[KeptBytes, Numbers]] = [
        (of(block_bytes, block), passes * number) for block, number in stage.blocks
    ]
    further: Numbers = 0.0
    if stage.head and shape.mtp_layers:
        # of the last chunk, which turns round with every micro-batch
        further = shape.mtp_layers * (passes if stage.layers and strategy.virtual_stages == 1 else 1.0)
        kept.append((of(block_bytes, like_blocks(shape)[-1]), further))
    if not kept:
        return 0.0, 0.0
    dense = sum(number * each.dense_bytes for each, number in kept)
    routed = sum(number * each.routed_bytes for each, number in kept)
    # of one block at a time all is there again
    once = kept[0][0]
    for each, _ in kept[1:]:
        once = either(each.total_bytes > once.total_bytes, each, once)
    full = of(recomputes_all)
    inputs = (passes * len(stage.layers) + further) * of(input_bytes)
    # the stream and the next token's row, either as it is and normed, are what a further token's block starts from
    joined = 4 * further * of(input_bytes)
    return either(full, inputs + once.dense_bytes, dense) + joined, either(full, once.routed_bytes, routed)
