"""Sizes of the tensors of a rank under nanotron, and when the memory of one that is dropped is free again."""

from dataclasses import dataclass
from typing import Literal

from turnout.plan.allocator import Block, CachingAllocator
from turnout.plan.job import Job

# whether launching runs ahead of the device: always, while the pipeline fills alone, or never
Host = Literal["ahead", "filling", "behind"]
# CUDA's queue of launches, and how far the host runs ahead: until its collective has run, a tensor that another stream
# reads is not free (Tensor.record_stream)
QUEUE = 1024


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of the tensors of one micro-batch on one rank; weights in numbers of them."""

    whole: float  # residual stream of all tokens
    share: float  # of this rank's tokens, under sequence parallelism
    queries: float
    keys: float  # as many are values
    hidden: float
    logits: float  # of a byte each
    turn: int  # cosines of a block, or sines
    head_dim: int
    weights: tuple[
        int, ...
    ]  # of a block as backward meets them: down, gate and up, output, queries with keys and values
    table: int

    @classmethod
    def of(cls, job: Job) -> "Sizes":
        """Those of a job."""
        shape, tp = job.shape, job.strategy.tp
        whole = job.rank_tokens * shape.dim * 2
        ratio = shape.head_dim / shape.dim / tp
        heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        products = (shape.ffn_hidden, 2 * shape.ffn_hidden, shape.num_heads * shape.head_dim, heads)
        return cls(
            whole=whole, share=whole / tp, queries=whole * shape.num_heads * ratio,
            keys=whole * shape.num_kv_heads * ratio, hidden=whole * shape.ffn_hidden / shape.dim / tp,
            logits=job.rank_tokens * shape.vocab_size / tp, turn=job.seq_len * shape.head_dim,
            head_dim=shape.head_dim, weights=tuple(width * shape.dim // tp for width in products),
            table=shape.vocab_size * shape.dim // tp,
        )  # fmt: skip


@dataclass(kw_only=True)
class Tensors:
    """Makes and drops them, as far ahead of the device as the host runs."""

    memory: CachingAllocator
    host: Host
    tp: int  # tensor-parallel ranks, whose collectives read tensors on a stream of their own
    filling: bool = False  # the host runs ahead in this pass, but will not go on to
    pace: float = 1.0  # launches a tensor

    def make(self, size: float) -> Block:
        """A tensor of so many bytes."""
        self.launch(self.pace)
        return self.memory.make(size)

    def launch(self, number: float) -> None:
        """So many kernels and waits beside those that make a tensor."""
        # of what was late when the pipeline was full, the backward passes find nothing
        if self.host == "ahead" or self.filling:
            self.memory.launch(number)

    def drop(self, *blocks: Block) -> None:
        """Drops what only the stream of products has read."""
        self.memory.drop(*blocks)

    def drop_sent(self, block: Block, *, output: bool = False) -> None:
        """Drops what a collective over tensor-parallel ranks has read or written; `output`: of a block's product."""
        if self.tp > 1 and (self.host == "ahead" or (self.filling and output)):
            self.memory.drop_late(block, QUEUE)
        else:
            self.memory.drop(block)
