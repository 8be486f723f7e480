"""One micro-batch through a stage under nanotron, forward and backward, tensor by tensor.

Source of every tensor, in the order they are made and dropped: https://github.com/huggingface/nanotron, models/llama.py
(attention with flash_rotary_embedding, whose queries stay views of queries, keys and values), and
parallel/tensor_parallel/functional.py (asynchronous, inputs gathered again in the backward pass).
"""

from collections import deque
from dataclasses import dataclass, field

from turnout.plan.allocator import Block
from turnout.plan.nanotron_tensors import Sizes, Tensors

# launches for a tensor made: going forward a block has 17 in 28 kernels and 8 waits of a stream, going back 26 in 50
_FORWARD, _BACKWARD = 36 / 17, 50 / 26
# and of a micro-batch beside them: the table's lookup with what is sent to the next stage, the loss; of a block, its
# gradients added in fp32
_MICRO_LAUNCHES, _LOSS_LAUNCHES, _SUM_LAUNCHES = 26, 32, 6


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
class Passes:
    """The passes of a stage, in the order its schedule asks for them."""

    sizes: Sizes
    tensors: Tensors
    blocks: int  # of the stage
    head: bool  # the stage has the output matrix
    several: bool  # sequences of a micro-batch, which lie side by side in the stream and one after another in attention
    flying: deque[tuple[list[_Kept], list[Block]]] = field(default_factory=deque)  # forward, not yet backward
    turns: list[Block] = field(default_factory=list)  # cosines and sines, of each block its own

    def forward(self) -> None:
        """The next micro-batch forward."""
        make, drop, sizes = self.tensors.make, self.tensors.drop, self.sizes
        self.tensors.pace = _FORWARD
        self.tensors.launch(_MICRO_LAUNCHES)
        stream = self._scattered(make(sizes.whole))
        kept = []
        turns = [] if self.turns else [sizes.turn] * 2
        for _ in range(self.blocks):
            stream, block = self._block_forward(stream, turns)
            kept.append(block)
        top = [stream]
        if self.head:
            self.tensors.launch(_LOSS_LAUNCHES)
            top.append(make(sizes.share))
            half, full = make(2 * sizes.logits), make(4 * sizes.logits)
            drop(half)
            top.append(make(4 * sizes.logits))
            drop(full)
        self.flying.append((kept, top))

    def _block_forward(self, first: Block, turns: list[int]) -> tuple[Block, _Kept]:
        """(the residual stream after a block, what it keeps)."""
        make, drop, sizes = self.tensors.make, self.tensors.drop, self.sizes
        normed = make(sizes.share)
        all_three = make(sizes.queries + 2 * sizes.keys)
        turned = make(sizes.queries + 2 * sizes.keys)
        drop(all_three)
        pair = make(2 * sizes.keys)
        pairs = make(2 * sizes.keys)
        drop(pair)
        self.turns.extend(make(size) for size in turns)
        out, sums = make(sizes.queries), make(2 * sizes.queries / sizes.head_dim)
        copy = [make(sizes.queries)] if self.several else []
        output = make(sizes.whole)
        drop(*copy)
        middle = self._added(output)
        second = make(sizes.share)
        gate_up, gate, product = make(2 * sizes.hidden), make(sizes.hidden), make(sizes.hidden)
        stream = self._added(make(sizes.whole))
        return stream, _Kept(
            inputs=[first, normed], attention=[turned, pairs, out, sums], middle=[middle], normed=[second],
            gate_up=gate_up, gate=gate, product=product,
        )  # fmt: skip

    def backward(self) -> None:
        """The first micro-batch in flight backward."""
        make, drop, sizes = self.tensors.make, self.tensors.drop, self.sizes
        self.tensors.pace = _BACKWARD
        kept, top = self.flying.popleft()
        gradients: list[Block] = []
        if self.head:
            stream, normed, scores = top
            half = make(2 * sizes.logits)
            drop(scores)
            gradient = self._column(half, 2 * sizes.table, gradients)
            drop(normed)
            stream_gradient = make(sizes.share)
            drop(gradient, stream)
        else:
            stream_gradient = make(sizes.share)
            drop(*top)
        for block in reversed(kept):
            stream_gradient = self._block_backward(block, stream_gradient, gradients)
        table_gradient_of = stream_gradient
        if self.tensors.tp > 1:
            table_gradient_of = make(sizes.whole)
            self.tensors.drop_sent(stream_gradient)
        table = make(2 * sizes.table)
        self.tensors.drop_sent(table_gradient_of)
        if self.head:
            drop(table)  # added to that of the output matrix, which is the same
        else:
            gradients.append(table)
        self.tensors.launch(_SUM_LAUNCHES * len(kept))
        drop(*gradients)

    def _block_backward(self, block: _Kept, gradient: Block, gradients: list[Block]) -> Block:
        make, drop, sizes = self.tensors.make, self.tensors.drop, self.sizes
        down, gate_up, output, heads = (2 * size for size in sizes.weights)
        inner = make(sizes.hidden)
        gradients.append(make(down))
        drop(block.product)
        gate, up = make(sizes.hidden), make(sizes.hidden)
        drop(inner, block.gate)
        before = make(sizes.hidden)
        drop(gate)
        both = make(2 * sizes.hidden)
        drop(before, up, block.gate_up)
        gradient = self._norm(self._column(both, gate_up, gradients), block.normed, block.middle, gradient)
        out = make(sizes.queries)
        copy = [make(sizes.queries)] if self.several else []
        gradients.append(make(output))
        drop(*copy)
        if self.several:
            turned = make(sizes.queries)
            drop(out)
            out = turned
        of_queries, of_keys, of_values = make(sizes.queries), make(sizes.keys), make(sizes.keys)
        drop(make(2 * sizes.queries), out, *block.attention[2:])  # queries' gradient is summed in fp32
        pair = make(2 * sizes.keys)
        drop(of_keys, of_values, *block.attention[:2])
        pairs = make(2 * sizes.keys)
        drop(pair)
        stacked = make(sizes.queries + 2 * sizes.keys)
        drop(of_queries, pairs)
        all_three = make(sizes.queries + 2 * sizes.keys)
        drop(stacked)
        return self._norm(self._column(all_three, heads, gradients), block.inputs[1:], block.inputs[:1], gradient)

    def _column(self, of_output: Block, weight_bytes: float, gradients: list[Block]) -> Block:
        """Gradient of a column-parallel product's input, this rank's share of it."""
        make, sizes = self.tensors.make, self.sizes
        gradient = make(sizes.whole)
        share = make(sizes.share) if self.tensors.tp > 1 else gradient
        gradients.append(make(weight_bytes))
        self.tensors.drop(of_output)
        if share is not gradient:
            self.tensors.drop_sent(gradient)
        return share

    def _norm(self, of_output: Block, normed: list[Block], stream: list[Block], around: Block) -> Block:
        """Gradient of a norm's input, that of the way around it added."""
        self.tensors.drop(*normed)
        inner = self.tensors.make(self.sizes.share)
        self.tensors.drop(of_output, *stream)
        both = self.tensors.make(self.sizes.share)
        self.tensors.drop(inner, around)
        return both

    def _scattered(self, whole: Block, *, output: bool = False) -> Block:
        """This rank's share of a sum over tensor-parallel ranks."""
        if self.tensors.tp == 1:
            return whole
        share = self.tensors.make(self.sizes.share)
        self.tensors.drop_sent(whole, output=output)
        return share

    def _added(self, output: Block) -> Block:
        """The residual stream after a row-parallel product."""
        share = self._scattered(output, output=True)
        stream = self.tensors.make(self.sizes.share)
        self.tensors.drop_sent(share)
        return stream
