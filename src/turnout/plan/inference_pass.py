"""One forward pass on the busiest device: what it reads, computes and waits for, block by block.

A product takes as long as its arithmetic or as reading its weights, whichever is longer (Williams et al. 2009), with
the planner's fitted shares of both peaks, and the way of its operands and result through memory on top, as in training.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

from turnout.plan.collectives import Collective
from turnout.plan.compute import block_time, products_of
from turnout.plan.engine import Engine
from turnout.plan.expert_volume import exchange, expert_tensor_volume
from turnout.plan.inference_experts import touched_at_busiest
from turnout.plan.inference_load import Load, cache_bytes_per_token, cached_flops_per_pair, plain
from turnout.plan.pipeline import Stage, stages
from turnout.plan.serving import Serving
from turnout.plan.terms import larger, smaller
from turnout.plan.volume import embedding_volume, tensor_volume
from turnout.plan.wire import Run, collective_s
from turnout.strategy import ELEMENT_BYTES

REGATHER = "sp regather"  # of inputs for weight gradients
BACKWARD = 0.5  # of a training step's sums and gathers, the forward pass's share


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward pass; the parts of `total_s` come first and sum to it."""

    products_s: float  # dense products, element-wise work, the router, the output matrix
    experts_s: float  # products of routed experts
    attention_s: float  # between the projections
    tp_s: float  # sums over ranks that share a matrix, expert slices included
    ep_s: float  # the experts' all-to-all, as far as nothing hides it
    host_s: float  # experts fetched from host memory
    weight_bytes: float  # read by the device, experts fetched from the host included
    cache_bytes: float  # keys and values read by the device

    @property
    def total_s(self) -> float:
        return sum(value for name, value in vars(self).items() if name.endswith("_s"))

    @property
    def read_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: "Forward") -> "Forward":
        return Forward(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Forward)})

    def times(self, number: float) -> "Forward":
        """The same, `number` times over."""
        return Forward(**{each.name: getattr(self, each.name) * number for each in fields(Forward)})


def forward(serving: Serving, load: Load, *, exchanged: bool = True) -> Forward:
    """The pass, over all blocks, tables and the output matrix; without `exchanged` the all-to-all costs nothing."""
    one = ForwardPass(serving=serving, load=load, exchanged=exchanged)
    (stage,) = stages(serving.shape, 1)
    total = one.ends()
    for block, number in stage.blocks:
        total = total + one.block(block).times(number)
    return total


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """A pass whose tokens go through every block in as many chunks as the layout overlaps."""

    serving: Serving
    load: Load
    exchanged: bool = True  # the all-to-all costs what it costs

    @property
    def chunks(self) -> int:
        return min(self.serving.layout.overlap, max(1, self.load.tokens))

    @cached_property
    def run(self) -> Run:
        """Of one chunk."""
        return self.serving.run(self.load.tokens / self.chunks)

    @cached_property
    def bare(self) -> Engine:
        """The device with its arithmetic alone: what crosses memory is counted apart."""
        return replace(self.run.engine, parameters=replace(self.serving.parameters, gemm_passes=0.0))

    def block(self, block: int) -> Forward:
        """One block; the exchange of a chunk runs behind the computation of the others."""
        dense_s, dense_bytes = self._dense(block)
        attention_s, cache_bytes = self._attention(block)
        experts_s, read_bytes, host_s = self._experts(block)
        chunks = self.chunks
        busy_s = chunks * (dense_s + experts_s) + attention_s
        wire_s = chunks * self.exchange_s(block)
        exposed_s = wire_s
        if chunks > 1:
            exposed_s = larger(busy_s, wire_s) + smaller(busy_s, wire_s) / chunks - busy_s
        return Forward(
            products_s=chunks * dense_s, experts_s=chunks * experts_s, attention_s=attention_s,
            tp_s=chunks * self._tensor_s(block), ep_s=exposed_s, host_s=host_s,
            weight_bytes=chunks * (dense_bytes + read_bytes), cache_bytes=cache_bytes,
        )  # fmt: skip

    def ends(self) -> Forward:
        """The sum after the table of tokens, and the output matrix for the last token of each sequence."""
        shape, strategy = self.serving.shape, self.serving.layout
        precision, rows = plain(strategy.precision), self.load.sequences
        head_s, head_bytes = self._product((rows, shape.vocab_size / strategy.tp, shape.dim), precision)
        table = Stage(index=0, layers=(), embedding=True, head=False, blocks=())
        summed = embedding_volume(self.run.step(table, self.load.tokens))
        tp_s = BACKWARD * sum(collective_s(part, self.run.cluster) for part in summed)
        return Forward(
            products_s=head_s, experts_s=0.0, attention_s=0.0, tp_s=tp_s, ep_s=0.0, host_s=0.0,
            weight_bytes=head_bytes, cache_bytes=0.0,
        )  # fmt: skip

    # --- computation of one chunk ---

    def _product(self, size: tuple[float, float, float], precision: str) -> tuple[float, float]:
        """(seconds, bytes of weights) of an (m, k) by (k, n) product."""
        m, n, k = size
        weights = ELEMENT_BYTES[precision] * k * n
        return self._roof_s(self.bare.product_s(m, n, k, precision), weights, m, n + k, precision), weights

    def _roof_s(self, flops_s: float, weights: float, rows: float, width: float, precision: str) -> float:
        """Arithmetic or weights, whichever takes longer, and the rows that go in and come out."""
        engine = self.run.engine
        moved = rows * width * max(2.0, ELEMENT_BYTES[precision])
        return larger(flops_s, engine.bytes_s(weights)) + engine.parameters.gemm_passes * engine.bytes_s(moved)

    def _dense(self, block: int) -> tuple[float, float]:
        """(seconds, bytes of weights) of dense products, the router and element-wise work."""
        job, engine, strategy = self.run.job, self.run.engine, self.serving.layout
        products = [(product, strategy.precision) for product in products_of(job, block)]
        known = block_time(job, block, engine)
        counted = sum(engine.product_s(*product, precision) for product, precision in products)
        elementwise_s = max(0.0, known.forward_s - known.experts_s - known.scores_s - counted)
        if experts := self.serving.shape.experts_of(block):
            products.append(((job.routed_tokens, experts, self.serving.shape.dim), plain(strategy.precision)))
        each = [self._product(product, precision) for product, precision in products]
        return elementwise_s + sum(seconds for seconds, _ in each), sum(weights for _, weights in each)

    def _attention(self, block: int) -> tuple[float, float]:
        """(seconds, bytes of the cache that are read) of all chunks together."""
        shape, strategy, load = self.serving.shape, self.serving.layout, self.load
        keys = load.keys(block)
        flops = load.tokens * keys * (cached_flops_per_pair(shape) if load.cached else shape.attention_flops_per_pair)
        read = load.sequences * keys * cache_bytes_per_token(self.serving) if load.cached else 0.0
        engine = self.run.engine
        return larger(engine.attention_s(flops / strategy.tp), engine.bytes_s(read)), read

    def _experts(self, block: int) -> tuple[float, float, float]:
        """(seconds, bytes of weights of a chunk; seconds of fetching them from the host) on the busiest rank."""
        serving, shape, strategy = self.serving, self.serving.shape, self.serving.layout
        experts = shape.experts_of(block)
        if not experts:
            return 0.0, 0.0, 0.0
        hidden, width = shape.expert_hidden / strategy.etp, shape.latent_dim or shape.dim
        inner = (2 if shape.gated else 1) * hidden
        precision, local = strategy.precision, experts / strategy.ep
        rows, tokens = self.routed()
        read = touched_at_busiest(experts, shape.top_k, tokens, strategy.ep)
        flops_s = self.bare.product_s(rows, inner, width, precision, grouped=True)
        flops_s += self.bare.product_s(rows, width, hidden, precision, grouped=True)
        weights = ELEMENT_BYTES[precision] * width * (inner + hidden)
        moved = 2 * width + inner + hidden
        fetched = serving.offload.missed(
            touched_at_busiest(experts, shape.top_k, tokens * self.chunks, strategy.ep), local
        )
        host_s = serving.offload.link(serving.machine.device).time_s(fetched * weights, 0) if fetched else 0.0
        return self._roof_s(flops_s, read * weights, rows, moved, precision), read * weights, host_s

    def routed(self) -> tuple[float, float]:
        """(rows of the busiest expert rank, distinct tokens its group of ranks routes) of one chunk.

        Where tensor-parallel ranks each send whole tokens, a token arrives more than once.
        """
        strategy, job = self.serving.layout, self.run.job
        arrivals = strategy.ep * job.routed_tokens * (strategy.etp if strategy.tokens_sharded else 1)
        ranks = strategy.ep * (strategy.etp / strategy.tp if strategy.folded else 1.0)
        whole = job.rank_tokens * (ranks if strategy.tokens_sharded else max(1.0, ranks))
        everywhere = self.load.all_sequences * self.load.length / self.chunks
        tokens = min(whole, max(1.0, everywhere))
        return arrivals / whole * tokens * self.serving.shape.top_k / strategy.ep * self.serving.skew, tokens

    # --- communication of one chunk ---

    def _tensor_s(self, block: int) -> float:
        """Sums over tensor-parallel ranks, and rows gathered and summed by those that share an expert."""
        step, cluster = self.run.block(block), self.run.cluster
        parts = [part for part in tensor_volume(step) if part.name != REGATHER]
        if experts := self.serving.shape.experts_of(block):
            parts += expert_tensor_volume(step, experts)
        return BACKWARD * sum(collective_s(part, cluster) for part in parts)

    def exchange_s(self, block: int) -> float:
        """Dispatch and combine of the busiest rank: what full recomputation sends again is one of each."""
        experts = self.serving.shape.experts_of(block)
        if not experts or self.serving.layout.ep == 1 or not self.exchanged:
            return 0.0
        _, passed = exchange(self.run.block(block), experts)
        if self.serving.one_sided:
            passed = at_once(passed)
        return self.serving.skew * collective_s(passed, self.run.cluster)


def at_once(part: Collective) -> Collective:
    """The exchange with all sends of dispatch, then all of combine, under way together."""
    intra, inter = (min(2.0, messages) for messages in (part.intra_messages, part.inter_messages))
    return replace(part, intra_messages=intra, inter_messages=inter)
