"""Bytes of device memory that serving a model needs: weights, keys and values, one block's activations."""

from dataclasses import dataclass, fields

from turnout.plan.activations import block_bytes
from turnout.plan.inference_load import Load, cache_bytes_per_token, decode_load, plain, prefill_load
from turnout.plan.memory import CONTEXT_BYTES, WORKSPACE_BYTES
from turnout.plan.pipeline import stages
from turnout.plan.serving import Serving
from turnout.strategy import ELEMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class ServingMemory:
    """Bytes on the device that holds most."""

    dense_bytes: float  # weights that every token meets, tables included
    experts_bytes: float  # weights of routed experts kept on the device
    cache_bytes: float  # keys and values of its sequences, at the end of their answers
    activations_bytes: float  # of one block, and logits, of the larger of prefill and decode
    workspace_bytes: float  # of the matrix library, and the context outside any allocator

    @property
    def total_bytes(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))

    def fits(self, device_bytes: float) -> bool:
        """Whether a device of this memory (as the data sheet counts) holds it."""
        return self.total_bytes <= device_bytes


def serving_memory(serving: Serving) -> ServingMemory:
    """Memory of the device that needs most."""
    shape, strategy = serving.shape, serving.layout
    element, tables = ELEMENT_BYTES[strategy.precision], shape.embedding_params + shape.head_params
    dense = element * (shape.dense_params - tables) + ELEMENT_BYTES[plain(strategy.precision)] * tables
    experts = sum(
        element * shape.routed_params(layer) * serving.offload.resident_share(shape.experts_of(layer) / strategy.ep)
        for layer in shape.sparse_layers
    )
    return ServingMemory(
        dense_bytes=dense / strategy.tp,
        experts_bytes=experts / (strategy.ep * strategy.etp),
        cache_bytes=serving.rank_batch * sequence_cache_bytes(serving),
        activations_bytes=max(_live_bytes(serving, load) for load in (decode_load(serving), prefill_load(serving))),
        workspace_bytes=WORKSPACE_BYTES + CONTEXT_BYTES,
    )


def sequence_cache_bytes(serving: Serving) -> float:
    """Keys and values of one whole sequence on one device; a windowed block keeps its window."""
    shape, length = serving.shape, serving.context + serving.new_tokens
    kept = sum(shape.keys_per_query(block, length, causal=False) for block in range(shape.all_layers))
    return kept * cache_bytes_per_token(serving)


def _live_bytes(serving: Serving, load: Load) -> float:
    """What one block of a pass holds at most, and its logits."""
    job = serving.run(load.tokens).job
    (stage,) = stages(serving.shape, 1)
    block = max(block_bytes(job, block).total_bytes for block, _ in stage.blocks)
    logits = load.sequences * serving.shape.vocab_size / serving.layout.tp * job.framework.logit_bytes
    return block + logits
