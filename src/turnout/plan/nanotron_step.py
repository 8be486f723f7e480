"""What a rank of nanotron's first pipeline stage allocates in a step, tensor by tensor, and so holds from the device.

nanotron prints what its rank 0 has reserved. Source of every tensor, in the order they are made and dropped:
https://github.com/huggingface/nanotron, models/llama.py (attention with flash_rotary_embedding, whose queries stay
views of queries, keys and values), parallel/tensor_parallel/functional.py (asynchronous, inputs gathered again in the
backward pass), optim/gradient_accumulator.py (all bf16 gradients of a pass, then added in fp32), optim/zero.py and
distributed.py (all_gather_coalesced), parallel/pipeline_parallel/engine.py (1F1B).
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from turnout.errors import ConfigError
from turnout.plan.allocator import MIB, Block, CachingAllocator
from turnout.plan.job import Job
from turnout.plan.pipeline import Stage, stages

# whether launching runs ahead of the device: always, while the pipeline fills alone, or never
Host = Literal["ahead", "filling", "behind"]
# CUDA's queue of launches, and how far the host runs ahead: until its collective has run, a tensor that another stream
# reads is not free (Tensor.record_stream)
QUEUE = 1024
# launches for a tensor made: going forward a block has 17 in 28 kernels and 8 waits of a stream, going back 26 in 50
_FORWARD, _BACKWARD = 36 / 17, 50 / 26
# and of a micro-batch beside them: the table's lookup with what is sent to the next stage, the loss; of a block, its
# gradients added in fp32
_MICRO_LAUNCHES, _LOSS_LAUNCHES, _SUM_LAUNCHES = 26, 32, 6
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
    return _Rank(job=job, stage=stage, host=host if strategy.tp > 1 else "behind", memory=memory).run()


@dataclass(kw_only=True)
class _Kept:
    """What one micro-batch keeps of a block for its backward pass."""

    inputs: list[Block]  # of the first norm and of queries, keys and values
    attention: list[Block]  # what attention reads and gives
    middle: list[Block]  # input of the second norm
    normed: list[Block]  # input of gate and up
    gate_up: Block
    gate: Block  # after its activation
    product: Block


@dataclass(kw_only=True)
class _Rank:
    job: Job
    stage: Stage
    host: Host
    memory: CachingAllocator
    flying: deque[tuple[list[_Kept], list[Block]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        shape, tp = self.job.shape, self.job.strategy.tp
        self.whole = self.job.rank_tokens * shape.dim * 2  # residual stream of all tokens
        self.share = self.whole / tp  # of this rank's tokens, under sequence parallelism
        ratio = shape.head_dim / shape.dim / tp
        self.queries, self.keys = (self.whole * heads * ratio for heads in (shape.num_heads, shape.num_kv_heads))
        self.hidden = self.whole * shape.ffn_hidden / shape.dim / tp
        self.logits = self.job.rank_tokens * shape.vocab_size / tp  # of a byte each
        heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        # (down, gate and up, output, queries with keys and values): a block's weights, as backward meets them
        products = (shape.ffn_hidden, 2 * shape.ffn_hidden, shape.num_heads * shape.head_dim, heads)
        self.weights = [width * shape.dim // tp for width in products]
        self.table = shape.vocab_size * shape.dim // tp
        self.head = self.stage.head
        self.filling = False  # the host runs ahead in this pass, but will not go on to
        self.pace = _FORWARD  # launches a tensor
        self.turns: list[Block] = []  # cosines and sines, of each block its own

    def run(self) -> int:
        strategy, memory = self.job.strategy, self.memory
        weights = [self.table, *(self.weights * len(self.stage.layers))]
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
            memory.make(self.whole)
            memory.make(self.whole)
        for step in range(_STEPS):
            self._passes()
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

    def _passes(self) -> None:
        """Micro-batches of a step, as many as make a difference."""
        pp = self.job.strategy.pp
        number = min(self.job.micro_batches, pp + 2)
        ahead = min(number, pp - 1)
        for i in range(number):
            self.filling = self.host == "filling" and i < pp - 2
            self._forward()
            if i >= ahead:
                self._backward()
        for _ in range(ahead):
            self._backward()

    def _make(self, size: float) -> Block:
        self._launch(self.pace)
        return self.memory.make(size)

    def _launch(self, number: float) -> None:
        # of what was late when the pipeline was full, the backward passes find nothing
        if self.host == "ahead" or self.filling:
            self.memory.launch(number)

    def _drop_sent(self, block: Block, *, output: bool = False) -> None:
        """Drops what a collective over tensor-parallel ranks has read or written; `output`: of a block's product."""
        if self.job.strategy.tp > 1 and (self.host == "ahead" or (self.filling and output)):
            self.memory.drop_late(block, QUEUE)
        else:
            self.memory.drop(block)

    # --- one micro-batch ---

    def _forward(self) -> None:
        make, drop = self._make, self.memory.drop
        self.pace = _FORWARD
        self._launch(_MICRO_LAUNCHES)
        stream = self._scattered(make(self.whole))
        kept = []
        turns = [] if self.turns else [self.job.seq_len * self.job.shape.head_dim] * 2
        for _ in self.stage.layers:
            first, normed = stream, make(self.share)
            all_three = make(self.queries + 2 * self.keys)
            turned = make(self.queries + 2 * self.keys)
            drop(all_three)
            pair = make(2 * self.keys)
            pairs = make(2 * self.keys)
            drop(pair)
            self.turns.extend(make(size) for size in turns)
            out, sums = make(self.queries), make(2 * self.queries / self.job.shape.head_dim)
            attention = [turned, pairs, out, sums]
            # sequences lie side by side in the stream, one after another in attention
            copy = [make(self.queries)] if self.job.strategy.micro_batch > 1 else []
            output = make(self.whole)
            drop(*copy)
            middle = self._added(output)
            second = make(self.share)
            gate_up, gate, product = make(2 * self.hidden), make(self.hidden), make(self.hidden)
            stream = self._added(make(self.whole))
            kept.append(
                _Kept(inputs=[first, normed], attention=attention, middle=[middle], normed=[second], gate_up=gate_up,
                      gate=gate, product=product)
            )  # fmt: skip
        top = [stream]
        if self.head:
            self._launch(_LOSS_LAUNCHES)
            top.append(make(self.share))
            half, full = make(2 * self.logits), make(4 * self.logits)
            drop(half)
            top.append(make(4 * self.logits))
            drop(full)
        self.flying.append((kept, top))

    def _backward(self) -> None:
        make, drop = self._make, self.memory.drop
        self.pace = _BACKWARD
        kept, top = self.flying.popleft()
        gradients: list[Block] = []
        if self.head:
            stream, normed, scores = top
            half = make(2 * self.logits)
            drop(scores)
            gradient = self._column(half, 2 * self.table, gradients)
            drop(normed)
            stream_gradient = make(self.share)
            drop(gradient, stream)
        else:
            stream_gradient = make(self.share)
            drop(*top)
        for block in reversed(kept):
            stream_gradient = self._block_backward(block, stream_gradient, gradients)
        table_gradient_of = stream_gradient
        if self.job.strategy.tp > 1:
            table_gradient_of = make(self.whole)
            self._drop_sent(stream_gradient)
        table = make(2 * self.table)
        self._drop_sent(table_gradient_of)
        if self.head:
            drop(table)  # added to that of the output matrix, which is the same
        else:
            gradients.append(table)
        self._launch(_SUM_LAUNCHES * len(kept))
        drop(*gradients)

    def _block_backward(self, block: _Kept, gradient: Block, gradients: list[Block]) -> Block:
        make, drop = self._make, self.memory.drop
        down, gate_up, output, heads = (2 * size for size in self.weights)
        inner = make(self.hidden)
        gradients.append(make(down))
        drop(block.product)
        gate, up = make(self.hidden), make(self.hidden)
        drop(inner, block.gate)
        before = make(self.hidden)
        drop(gate)
        both = make(2 * self.hidden)
        drop(before, up, block.gate_up)
        gradient = self._norm(self._column(both, gate_up, gradients), block.normed, block.middle, gradient)
        several = self.job.strategy.micro_batch > 1
        out = make(self.queries)
        copy = [make(self.queries)] if several else []
        gradients.append(make(output))
        drop(*copy)
        if several:
            turned = make(self.queries)
            drop(out)
            out = turned
        of_queries, of_keys, of_values = make(self.queries), make(self.keys), make(self.keys)
        drop(make(2 * self.queries), out, *block.attention[2:])  # queries' gradient is summed in fp32
        pair = make(2 * self.keys)
        drop(of_keys, of_values, *block.attention[:2])
        pairs = make(2 * self.keys)
        drop(pair)
        stacked = make(self.queries + 2 * self.keys)
        drop(of_queries, pairs)
        all_three = make(self.queries + 2 * self.keys)
        drop(stacked)
        return self._norm(self._column(all_three, heads, gradients), block.inputs[1:], block.inputs[:1], gradient)

    def _column(self, of_output: Block, weight_bytes: float, gradients: list[Block]) -> Block:
        """Gradient of a column-parallel product's input, this rank's share of it."""
        make = self._make
        gradient = make(self.whole)
        share = make(self.share) if self.job.strategy.tp > 1 else gradient
        gradients.append(make(weight_bytes))
        self.memory.drop(of_output)
        if share is not gradient:
            self._drop_sent(gradient)
        return share

    def _norm(self, of_output: Block, normed: list[Block], stream: list[Block], around: Block) -> Block:
        """Gradient of a norm's input, that of the way around it added."""
        self.memory.drop(*normed)
        inner = self._make(self.share)
        self.memory.drop(of_output, *stream)
        both = self._make(self.share)
        self.memory.drop(inner, around)
        return both

    def _scattered(self, whole: Block, *, output: bool = False) -> Block:
        """This rank's share of a sum over tensor-parallel ranks."""
        if self.job.strategy.tp == 1:
            return whole
        share = self._make(self.share)
        self._drop_sent(whole, output=output)
        return share

    def _added(self, output: Block) -> Block:
        """The residual stream after a row-parallel product."""
        share = self._scattered(output, output=True)
        stream = self._make(self.share)
        self._drop_sent(share)
        return stream


def _buckets(weights: list[int]) -> list[int]:
    """Bytes of the buckets of PyTorch's DistributedDataParallel, 25 MiB or a tensor whole, last weights first."""
    sizes, filled = [], 0
    for size in reversed(weights):
        filled += 2 * size
        if filled >= 25 * MIB:
            sizes.append(filled)
            filled = 0
    return [*sizes, filled] if filled else sizes
