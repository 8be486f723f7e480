"""Data-parallel traffic of a step: gradients of the dense part and of the experts, and ZeRO's gathers.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 7.
"""

from collections.abc import Iterator

from turnout.errors import ConfigError
from turnout.plan.collectives import Collective, all_gather, all_reduce, collective, group
from turnout.plan.step import Step, layers_of
from turnout.strategy import ELEMENT_BYTES, Strategy
from turnout.topology import Mesh


def data_volume(step: Step) -> Iterator[Collective]:
    """Gradients and sharded parameters, once a step (under ZeRO-3 for every micro-batch).

    Raises: ConfigError if a ZeRO shard does not fit the ranks that share parameters.
    """
    strategy = step.strategy
    dense_ranks = strategy.dp * strategy.cp
    dense = group(dense_ranks, strategy.tp, step.devices_per_node)
    yield from _reduced(step, "dp", "dense", dense, _dense_params(step))
    if step.shape.num_experts:
        experts = expert_data_mesh(strategy, step.devices_per_node)
        yield from _reduced(step, "edp", "expert", experts, _expert_params(step))


def expert_data_mesh(strategy: Strategy, devices_per_node: int) -> Mesh:
    """The ranks that hold the same experts, on their nodes."""
    copies = strategy.edp()
    if strategy.folded or strategy.etp == strategy.tp:
        return group(copies, strategy.ep * strategy.etp, devices_per_node)
    # whole experts on every tensor-parallel rank: its peers, and the ranks ep * tp apart
    peers = group(strategy.tp, 1, devices_per_node)
    apart = group(copies // strategy.tp, strategy.ep * strategy.tp, devices_per_node)
    return Mesh(nodes=peers.nodes * apart.nodes, local=peers.local * apart.local)


def _reduced(step: Step, axis: str, part: str, mesh: Mesh, params: float) -> Iterator[Collective]:
    """Gradients summed over copies; under ZeRO scattered to shards, and parameters gathered from them."""
    strategy = step.strategy
    gradient = params * ELEMENT_BYTES[strategy.grad_precision]
    weights = params * strategy.activation_bytes
    if strategy.zero == 0:
        yield collective(f"{part} gradient all-reduce", axis, mesh, all_reduce(mesh, gradient))
        return
    shard, copies = _sharded(strategy, mesh)
    times = step.micro_batches if strategy.zero == 3 and step.reshards else 1.0
    gathers = 2 if strategy.zero == 3 else 1
    yield collective(f"{part} gradient reduce-scatter", axis, shard, all_gather(shard, gradient), times)
    yield collective(f"{part} parameter all-gather", axis, shard, all_gather(shard, weights), times * gathers)
    shard_bytes = gradient / shard.size
    yield collective(f"{part} shard all-reduce", axis, copies, all_reduce(copies, shard_bytes))


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


def _dense_params(step: Step) -> float:
    """Parameters of a rank that are not routed experts."""
    shape, stage, tp = step.shape, step.stage, step.strategy.tp
    if stage is None:
        return shape.dense_params / step.strategy.pp / tp
    params = sum(map(shape.block_params, stage.layers)) + stage.embedding * shape.embedding_params
    if stage.head:
        params += shape.vocab_size * shape.dim + shape.mtp_layers * shape.mtp_params
    return params / tp


def _expert_params(step: Step) -> float:
    strategy = step.strategy
    held = sum(experts * number for experts, number in layers_of(step).items())
    return held * step.shape.expert_params / (strategy.ep * strategy.etp)
