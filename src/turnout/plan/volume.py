"""Bytes and messages of every collective of a training step, inside nodes and between them, for one rank.

Source of the closed forms: Shoeybi et al. 2019, arXiv:1909.08053 (tensor parallel); Korthikanti et al. 2022,
arXiv:2205.05198 (sequence parallel); Narayanan et al. 2021, arXiv:2104.04473, section 4.1 (scatter-gather); Liu et al.
2023, arXiv:2310.01889 (ring attention).
"""

from collections.abc import Callable, Iterator
from typing import Any

from turnout.plan.collectives import (
    Collective,
    all_gather,
    all_reduce,
    all_to_all,
    chunked,
    collective,
    group,
    pipeline_sends,
    ring_pass,
    stage_sends,
)
from turnout.plan.data_volume import data_volume
from turnout.plan.expert_volume import ROUTED, expert_volume
from turnout.plan.step import Step, buffer_bytes, layers_of


def volume(step: Step) -> tuple[Collective, ...]:
    """Every collective of the step that sends anything.

    Raises: ConfigError if the experts do not fit the expert ranks, or the layout asks for what no program does.
    """
    parts = (
        tensor_volume(step), embedding_volume(step), context_volume(step), pipeline_volume(step), expert_volume(step),
        data_volume(step),
    )  # fmt: skip
    return tuple(each for part in parts for each in part if each.total_bytes > 0)


def busiest_of(part: Collective, busiest: float) -> float:
    """Bytes and seconds of a collective on the rank that has most of them, over those of the mean one.

    `busiest`: rows of the busiest expert rank over the mean. It receives so many times the mean on the way to the
    experts and sends as many back.
    """
    return busiest if part.name in ROUTED else 1.0


def to_json(
    parts: tuple[Collective, ...], seconds: Callable[[Collective], float], busiest: float = 1.0
) -> dict[str, Any]:
    """What `plan volume --json` prints: every collective with its `seconds`, and bytes sent by one rank in a step.

    `busiest`: rows of the busiest expert rank over the mean, for which all wait.
    """
    rows = [(part, busiest_of(part, busiest)) for part in parts]
    return {
        "collectives": [
            part.to_json() | {"busiest_bytes": times * part.total_bytes, "seconds": times * seconds(part)}
            for part, times in rows
        ],
        "intra_bytes": sum(part.intra_bytes for part in parts),
        "inter_bytes": sum(part.inter_bytes for part in parts),
    }


# --- tensor and sequence parallel ---


def tensor_volume(step: Step) -> Iterator[Collective]:
    """Attention and FFN each end in a sum over tensor-parallel ranks, forward and, at their inputs, backward."""
    strategy = step.strategy
    mesh = group(strategy.tp, 1, step.devices_per_node)
    passes = 3 if strategy.recompute == "full" else 2
    summed = sum(number * (1 + _sums_ffn(step, experts)) for experts, number in layers_of(step).items())
    calls = summed * passes * step.micro_batches
    each_bytes = buffer_bytes(step)
    if not strategy.sequence_parallel:
        yield collective("tp all-reduce", "tp", mesh, all_reduce(mesh, each_bytes), calls)
        return
    # inputs are kept sharded and gathered again for the weight gradient; arXiv:2205.05198, section 4.2.2
    for name, times in (("sp all-gather", calls), ("sp reduce-scatter", calls), ("sp regather", calls / passes)):
        part = collective(name, "tp", mesh, all_gather(mesh, each_bytes), times)
        yield chunked(part, strategy.tp_overlap)


def _sums_ffn(step: Step, experts: int) -> bool:
    """Whether the FFN of a layer ends in a sum over tensor-parallel ranks."""
    strategy = step.strategy
    if experts == 0 or step.shape.shared_hidden:
        return True
    if strategy.alltoall == "coordinated" or strategy.sequence_parallel:
        return False
    # whole experts on every rank leave nothing to sum, unless each rank had only its share of the tokens
    return strategy.etp > 1 or strategy.shard_tokens


def embedding_volume(step: Step) -> Iterator[Collective]:
    """The vocabulary is cut over tensor-parallel ranks: a sum after the table, and one before the output matrix."""
    strategy, stage = step.strategy, step.stage
    mesh = group(strategy.tp, 1, step.devices_per_node)
    ends = 2 / strategy.pp if stage is None else stage.embedding + stage.head * (1 + step.shape.mtp_layers)
    if strategy.sequence_parallel:
        # scattered and gathered, each both ways
        yield collective(
            "embedding and head", "tp", mesh, all_gather(mesh, buffer_bytes(step)), 2 * ends * step.micro_batches
        )
    else:
        yield collective(
            "embedding and head", "tp", mesh, all_reduce(mesh, buffer_bytes(step)), ends * step.micro_batches
        )


# --- context parallel ---


def context_volume(step: Step) -> Iterator[Collective]:
    """Keys and values round a ring, twice that on the way back; or heads for tokens and back (Ulysses)."""
    strategy, shape = step.strategy, step.shape
    mesh = group(strategy.cp, strategy.tp, step.devices_per_node)
    calls = sum(layers_of(step).values()) * step.micro_batches
    element = step.tokens / step.micro_batches * strategy.activation_bytes / strategy.tp
    if shape.mla is None:
        queries, outputs = (shape.num_heads * shape.head_dim,) * 2
        keys = 2 * max(shape.num_kv_heads, strategy.tp) * shape.head_dim
    else:
        outputs = shape.num_heads * shape.mla.v_dim
        queries = shape.num_heads * (shape.mla.nope_dim + shape.mla.rope_dim)
        keys = queries + outputs
    repeats = 2 if strategy.recompute == "full" else 1
    if strategy.cp_kind == "ring":
        traffic = ring_pass(mesh, element * keys)
        yield collective("cp ring", "cp", mesh, traffic, calls * (repeats + 2))
    else:
        traffic = all_to_all(mesh, element * (queries + keys + outputs))
        yield collective("cp all-to-all", "cp", mesh, traffic, calls * (repeats + 1))


# --- pipeline ---


def pipeline_volume(step: Step) -> Iterator[Collective]:
    """Activations on, gradients back; an inner stage, which sends both."""
    strategy = step.strategy
    world = strategy.world()
    mesh = group(strategy.pp, world // strategy.pp, step.devices_per_node)
    shared = strategy.tp if strategy.scatter_gather or strategy.sequence_parallel else 1
    each_bytes = buffer_bytes(step)
    sends = pipeline_sends(strategy.pp, strategy.virtual_stages)
    yield collective("pp send", "pp", mesh, stage_sends(mesh, sends, each_bytes / shared), step.micro_batches)
    if strategy.scatter_gather and not strategy.sequence_parallel:
        peers = group(strategy.tp, 1, step.devices_per_node)
        yield collective("pp gather", "tp", peers, all_gather(peers, each_bytes), sends * step.micro_batches)
