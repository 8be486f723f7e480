"""Bytes that parameters need on a rank: weights, gradients, the optimizer's state, and what ZeRO gathers.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from dataclasses import dataclass

from turnout.plan.job import Job
from turnout.plan.model import ModelShape
from turnout.plan.pipeline import Stage
from turnout.plan.terms import Numbers, Terms, either, larger, reads


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


def model_bytes(of: Terms[Job], stage: Stage) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """(weights, gradients, optimizer, what it has between steps alone) of one rank of a stage."""
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


def moment_bytes(of: Terms[Job], stage: Stage) -> Numbers:
    """Gradients of a stage's widest matrices that are not yet added."""
    return of(unaccumulated_bytes) * _widest(of.subject.shape, stage)


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


def gathered_params_bytes(of: Terms[Job], stage: Stage) -> Numbers:
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
