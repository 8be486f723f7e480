"""Data-parallel traffic of a step: gradients of the dense part and of the experts, and ZeRO's gathers.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 7.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from turnout.alltoall import Traffic
from turnout.errors import ConfigError
from turnout.plan.collectives import Collective, all_gather, all_reduce, collective, group
from turnout.plan.model import ModelShape
from turnout.plan.pipeline import Stage
from turnout.plan.step import Step, layers_of
from turnout.strategy import ELEMENT_BYTES, Strategy
from turnout.topology import Mesh


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """One collective over ranks that share parameters."""

    name: str
    mesh: Mesh
    traffic: Traffic  # of one call
    calls: float = 1.0
    each_pass: bool = False  # of every micro-batch, where what is sharded is sharded again after each; else of a step


def data_volume(step: Step) -> Iterator[Collective]:
    """Gradients and sharded parameters, once a step or for every micro-batch.

    Raises: ConfigError if a ZeRO shard does not fit the ranks that share parameters.
    """
    strategy, devices = step.strategy, step.devices_per_node
    yield from _reduced(step, "dp", "dense", dense_mesh(strategy, devices), _dense_params(step))
    if step.shape.num_experts:
        yield from _reduced(step, "edp", "expert", expert_data_mesh(strategy, devices), _expert_params(step))


def dense_mesh(strategy: Strategy, devices_per_node: int) -> Mesh:
    """The ranks that hold the same dense parameters, on their nodes."""
    return group(strategy.dp * strategy.cp, strategy.tp, devices_per_node)


def expert_data_mesh(strategy: Strategy, devices_per_node: int) -> Mesh:
    """The ranks that hold the same experts, on their nodes."""
    copies = strategy.edp()
    if strategy.folded or strategy.etp == strategy.tp:
        return group(copies, strategy.ep * strategy.etp, devices_per_node)
    # whole experts on every tensor-parallel rank: its peers, and the ranks ep * tp apart
    peers = group(strategy.tp, 1, devices_per_node)
    apart = group(copies // strategy.tp, strategy.ep * strategy.tp, devices_per_node)
    return Mesh(nodes=peers.nodes * apart.nodes, local=peers.local * apart.local)


def reductions(strategy: Strategy, mesh: Mesh, params: float, *, sums: bool = False) -> Iterator[Reduction]:
    """Gradients of `params` summed over copies; under ZeRO scattered to shards, and parameters gathered from them.

    `sums`: under ZeRO-1 they are summed on every rank all the same.
    A rank that keeps a shard of the gradients alone (ZeRO-2) has to give away the rest after every micro-batch; one
    that keeps whole ones until the last (`zero_sum`) does so once.
    Raises: ConfigError if a ZeRO shard does not fit the ranks of the mesh.
    """
    gradient = params * ELEMENT_BYTES[strategy.grad_precision]
    weights = params * strategy.activation_bytes
    whole = strategy.zero == 0 or (sums and strategy.zero == 1)
    if whole:
        yield Reduction(name="gradient all-reduce", mesh=mesh, traffic=all_reduce(mesh, gradient))
    if strategy.zero == 0:
        return
    shard, copies = _sharded(strategy, mesh)
    scattered, gathered = all_gather(shard, gradient), all_gather(shard, weights)
    if not whole:
        each_pass = strategy.zero >= 2 and strategy.zero_sum == "micro_batch"
        yield Reduction(name="gradient reduce-scatter", mesh=shard, traffic=scattered, each_pass=each_pass)
    # ZeRO-3 gathers for the forward pass and again for the backward pass
    again = strategy.zero == 3
    yield Reduction(
        name="parameter all-gather", mesh=shard, traffic=gathered, calls=2 if again else 1, each_pass=again
    )  # fmt: skip
    if not whole:
        yield Reduction(name="shard all-reduce", mesh=copies, traffic=all_reduce(copies, gradient / shard.size))


def _reduced(step: Step, axis: str, part: str, mesh: Mesh, params: float) -> Iterator[Collective]:
    for each in reductions(step.strategy, mesh, params, sums=step.zero_sums):
        times = step.micro_batches if each.each_pass and step.reshards else 1.0
        yield collective(f"{part} {each.name}", axis, each.mesh, each.traffic, each.calls * times)


def _sharded(strategy: Strategy, mesh: Mesh) -> tuple[Mesh, Mesh]:
    """The ranks of one ZeRO shard group, neighbours, and the copies of a shard (HSDP)."""
    size = strategy.zero_size or mesh.size
    if mesh.size % size:
        raise ConfigError(f"strategy.zero_size={size} must divide the {mesh.size} ranks that share parameters")
    local = min(size, mesh.local)
    shard = Mesh(nodes=size // local, local=local) if size % local == 0 else Mesh(nodes=size)
    copies = mesh.size // size
    beside = max(1, mesh.local // size)
    return shard, Mesh(nodes=copies // beside, local=beside) if copies % beside == 0 else Mesh(nodes=copies)


def dense_stage_params(shape: ModelShape, stage: Stage) -> int:
    """Parameters of a stage, routed experts left out, whose gradients are reduced; before any sharding."""
    params = sum(number * shape.block_params(block) for block, number in stage.blocks)
    params += stage.embedding * shape.embedding_params
    if stage.head:
        params += shape.mtp_layers * shape.mtp_params
        # tied to a table of the same stage it is no matrix of its own; on another stage it is a copy
        params += 0 if shape.tied_embeddings and stage.embedding else shape.vocab_size * shape.dim
    return params


def _dense_params(step: Step) -> float:
    """Parameters of a rank that are not routed experts."""
    shape, stage, tp = step.shape, step.stage, step.strategy.tp
    if stage is None:
        return shape.dense_params / step.strategy.pp / tp
    return dense_stage_params(shape, stage) / tp


def _expert_params(step: Step) -> float:
    strategy = step.strategy
    held = sum(experts * number for experts, number in layers_of(step).items())
    return held * step.shape.expert_params / (strategy.ep * strategy.etp)
