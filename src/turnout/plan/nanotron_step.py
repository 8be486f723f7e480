"""What a rank of nanotron's first pipeline stage allocates in a step, tensor by tensor, and so holds from the device.

nanotron prints what its rank 0 has reserved. Source of what stays between passes (`nanotron_pass` has the others):
https://github.com/huggingface/nanotron, optim/gradient_accumulator.py (all bf16 gradients of a pass, then added in
fp32), optim/zero.py and distributed.py (all_gather_coalesced), parallel/pipeline_parallel/engine.py (1F1B).
"""

from turnout.errors import ConfigError
from turnout.plan.allocator import MIB, CachingAllocator
from turnout.plan.job import Job
from turnout.plan.nanotron_pass import Passes
from turnout.plan.nanotron_tensors import Host, Sizes, Tensors
from turnout.plan.pipeline import Stage, stages

_WORKSPACES = (32 * MIB, 32 * MIB)  # of the matrix library, by stream: PyTorch's CUBLAS_WORKSPACE_CONFIG on Hopper
_STEPS = 2  # moments are made at the end of the first, in what activations left; from the second on nothing changes


def reserved_bytes(job: Job, host: Host = "ahead", device_bytes: float = float("inf")) -> int:
    """Bytes that rank 0 holds from its device after some steps; a host that runs ahead stops where the device is full.

    Raises: ConfigError if the job is not one of nanotron's: dense, gated, ZeRO-1 at most, 1F1B, nothing recomputed.
    """
    shape, strategy = job.shape, job.strategy
    plain = strategy.zero <= 1 and strategy.virtual_stages == 1 and strategy.recompute == "none" and strategy.cp == 1
    if shape.num_experts or shape.mla or not shape.gated or not plain:
        raise ConfigError(
            f"layout {strategy} of {shape.name!r} is none whose tensors are known one by one; give a dense gated model "
            "with zero<=1, cp=1, virtual_stages=1 and recompute=none, or ask for memory() of any"
        )
    stage = stages(shape, strategy.pp, 1, job.framework.stage_balance)[0]
    memory = CachingAllocator(device_bytes)
    tensors = Tensors(memory=memory, host=host if strategy.tp > 1 else "behind", tp=strategy.tp)
    return _after_steps(job, stage, tensors)


def _after_steps(job: Job, stage: Stage, tensors: Tensors) -> int:
    """Bytes reserved after some steps, with all that stays between them."""
    strategy, memory, sizes = job.strategy, tensors.memory, Sizes.of(job)
    passes = Passes(
        sizes=sizes, tensors=tensors, blocks=len(stage.layers), head=stage.head, several=strategy.micro_batch > 1
    )
    weights = [sizes.table, *(sizes.weights * len(stage.layers))]
    params, shards = sum(weights), strategy.dp if strategy.zero else 1
    for size in weights:
        memory.make(2 * size)
    memory.make(4 * params)
    memory.make(4 * params / shards)
    for size in _buckets(weights) if strategy.dp > 1 and not strategy.zero else _WORKSPACES[:0]:
        memory.make(size)
    for size in _WORKSPACES:
        memory.make(size)
    if strategy.tp > 1:
        # MemoryBuffer: inputs of column-parallel products, gradients of row-parallel ones
        memory.make(sizes.whole)
        memory.make(sizes.whole)
    for step in range(_STEPS):
        _one_step(job, tensors, passes)
        memory.wait()
        if step == 0:
            for size in weights:
                memory.make(4 * size / shards)
                memory.make(4 * size / shards)
        if shards > 1:
            # this rank's part flat, everybody's parts flat, and the collective's own copy of these
            parts = [memory.make(2 * params / shards) for _ in range(1 + shards)]
            memory.drop(*parts, memory.make(2 * params))
    return memory.peak_reserved


def _one_step(job: Job, tensors: Tensors, passes: Passes) -> None:
    """Micro-batches of a step, as many as make a difference."""
    pp = job.strategy.pp
    number = min(job.micro_batches, pp + 2)
    ahead = min(number, pp - 1)
    for i in range(number):
        tensors.filling = tensors.host == "filling" and i < pp - 2
        passes.forward()
        if i >= ahead:
            passes.backward()
    for _ in range(ahead):
        passes.backward()


def _buckets(weights: list[int]) -> list[int]:
    """Bytes of the buckets of PyTorch's DistributedDataParallel, 25 MiB or a tensor whole, last weights first."""
    sizes, filled = [], 0
    for size in reversed(weights):
        filled += 2 * size
        if filled >= 25 * MIB:
            sizes.append(filled)
            filled = 0
    return [*sizes, filled] if filled else sizes
