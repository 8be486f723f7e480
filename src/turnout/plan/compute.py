"""Seconds that the arithmetic of one block takes on one device: products, attention, element-wise work, optimizer.

Roofline with few efficiencies: a product costs its operations at a share of the peak plus its operands' way through
memory; everything else costs its bytes. specs/planner.md, "Efficiency curve"; Williams et al. 2009 (roofline).
"""

from dataclasses import dataclass
from functools import cached_property

from turnout.plan.job import Job
from turnout.plan.parameters import Parameters
from turnout.strategy import ELEMENT_BYTES
from turnout.topology import Device


@dataclass(frozen=True, kw_only=True)
class BlockTime:
    """Device seconds of one block for one micro-batch, communication left out."""

    forward_s: float
    backward_s: float  # without what recomputation repeats
    experts_s: float  # of the forward pass, products of routed experts
    scores_s: float = 0.0  # of the forward pass, what selective recomputation repeats
    light_s: float = 0.0  # of the forward pass, what light recomputation repeats
    weights_s: float = 0.0  # of the backward pass, gradients of weights


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A device with the fitted efficiencies applied."""

    device: Device
    parameters: Parameters

    def product_s(self, m: float, n: float, k: float, precision: str) -> float:
        """Seconds of an (m, k) by (k, n) product."""
        moved = ELEMENT_BYTES[precision] * (m * k + k * n) + 2 * m * n
        return 2 * m * n * k / self._rate(precision) + self.parameters.gemm_passes * self.bytes_s(moved)

    def bytes_s(self, moved_bytes: float) -> float:
        """Seconds to read or write so much device memory."""
        return moved_bytes / (self.device.memory_bytes_per_s * self.parameters.memory)

    def _rate(self, precision: str) -> float:
        """FLOP/s that a large product reaches."""
        if precision not in self._rates:
            generation = self.device.generation
            rate = self.device.flops_per_s(precision) * self.parameters.gemm(generation)
            self._rates[precision] = rate * (self.parameters.low(generation) if ELEMENT_BYTES[precision] < 2 else 1.0)
        return self._rates[precision]

    @cached_property
    def _rates(self) -> dict[str, float]:
        return {}

    def attention_s(self, flops: float) -> float:
        """Seconds of a fused attention kernel."""
        precision = "bf16" if self.device.peak_flops_per_s.bf16 else "fp16"
        return flops / (self.device.flops_per_s(precision) * self.parameters.attention)


def products_of(job: Job, layer: int) -> list[tuple[float, float, float]]:
    """(m, n, k) of the dense products of block `layer` for one micro-batch on one rank, forward."""
    shape, tp, tokens = job.shape, job.strategy.tp, job.rank_tokens
    products = _attention_products(job)
    hidden = shape.shared_hidden if shape.experts_of(layer) else shape.ffn_hidden
    if hidden:
        up = (2 if shape.gated else 1) * hidden
        products += [(tokens, up / tp, shape.dim), (tokens, shape.dim, hidden / tp)]
    return products


def _attention_products(job: Job) -> list[tuple[float, float, float]]:
    shape, tp, tokens, dim = job.shape, job.strategy.tp, job.rank_tokens, job.shape.dim
    if shape.mla is None:
        heads, kv_heads = shape.num_heads * shape.head_dim, max(shape.num_kv_heads, tp) * shape.head_dim
        return [(tokens, (heads + 2 * kv_heads) / tp, dim), (tokens, dim, heads / tp)]
    m, heads = shape.mla, shape.num_heads / tp
    down = [(tokens, m.q_rank + m.kv_rank + m.rope_dim, dim)]
    queries = (tokens, heads * (m.nope_dim + m.rope_dim), m.q_rank or dim)
    return [*down, queries, (tokens, heads * (m.nope_dim + m.v_dim), m.kv_rank), (tokens, dim, heads * m.v_dim)]


def block_time(job: Job, layer: int, engine: Engine) -> BlockTime:
    """Device seconds of block `layer` for one micro-batch."""
    precision = job.strategy.precision
    dense = sum(engine.product_s(*product, precision) for product in products_of(job, layer))
    experts = _experts_s(job, layer, engine)
    scores_forward, scores_backward = _scores_s(job, layer, engine)
    moved = _elementwise_bytes(job, layer)
    elementwise = engine.bytes_s(moved)
    accumulate = engine.bytes_s(_accumulated_bytes(job, layer))
    return BlockTime(
        forward_s=dense + experts + scores_forward + elementwise,
        backward_s=2 * (dense + experts) + scores_backward + 1.5 * elementwise + accumulate,
        experts_s=experts,
        scores_s=scores_forward,
        light_s=engine.bytes_s(_light_bytes(job, layer)) + _up_projections_s(job, engine),
        weights_s=dense + experts + accumulate,
    )


def _light_bytes(job: Job, layer: int) -> float:
    """Bytes that norms and gated activations move, forward: what light recomputation repeats beside products."""
    shape, strategy = job.shape, job.strategy
    sequence = strategy.tp if strategy.sequence_parallel else 1
    ffn = shape.shared_hidden if shape.experts_of(layer) else shape.ffn_hidden
    moved = 2 * job.rank_tokens * (2 * 2 * shape.dim / sequence + _inner_moves(job) * ffn / strategy.tp)
    if shape.experts_of(layer):
        moved += 2 * job.routed_tokens * shape.top_k * job.skew * _inner_moves(job) * shape.expert_hidden
    return moved


def _up_projections_s(job: Job, engine: Engine) -> float:
    """Forward products from the narrow vectors of latent attention to heads; none without it."""
    shape = job.shape
    if shape.mla is None:
        return 0.0
    _, queries, keys, _ = _attention_products(job)
    repeated = (queries, keys) if shape.mla.q_rank else (keys,)
    return sum(engine.product_s(*product, job.strategy.precision) for product in repeated)


def _experts_s(job: Job, layer: int, engine: Engine) -> float:
    """Routed experts of the busiest rank, and the router."""
    shape, strategy = job.shape, job.strategy
    num_experts = shape.experts_of(layer)
    if not num_experts:
        return 0.0
    width, hidden = shape.latent_dim or shape.dim, shape.expert_hidden / strategy.etp
    local = num_experts / strategy.ep
    rows = job.routed_tokens * shape.top_k * strategy.etp * job.skew / local
    up = (2 if shape.gated else 1) * hidden
    one = engine.product_s(rows, up, width, strategy.precision)
    one += engine.product_s(rows, width, hidden, strategy.precision)
    return local * one + engine.product_s(job.routed_tokens, num_experts, shape.dim, _plain(strategy.precision))


def _scores_s(job: Job, layer: int, engine: Engine) -> tuple[float, float]:
    """Attention between the projections, forward and backward."""
    shape, strategy, tokens = job.shape, job.strategy, job.rank_tokens
    if job.framework.flash_attention:
        pairs = shape.keys_per_query(layer, job.seq_len, causal=True)
        flops = tokens * pairs * shape.attention_flops_per_pair / strategy.tp
        forward = engine.attention_s(flops / job.framework.attention_rate)
        # the scores are computed again: five products against two. Source: Dao 2023, arXiv:2307.08691, section 3.1
        return forward, 2.5 * forward
    heads, length = shape.num_heads / strategy.tp, job.seq_len
    batches = heads * tokens / length
    products = 2 * batches * engine.product_s(length, length, shape.head_dim, _plain(strategy.precision))
    # softmax reads and writes scores, dropout reads and writes them and a mask
    elementwise = engine.bytes_s(batches * length * length * (4 + (5 if job.framework.dropout else 0)))
    return products + elementwise, 2 * products + 1.5 * elementwise


def _elementwise_bytes(job: Job, layer: int) -> float:
    """Bytes that norms, residuals, activations, rotations, casts and the permutation of rows move, forward."""
    shape, strategy, tokens = job.shape, job.strategy, job.rank_tokens
    sequence = strategy.tp if strategy.sequence_parallel else 1
    # per token: two norms (read, write) and two residual additions (read two, write one) of width dim
    residual = (2 * 2 + 2 * 3) * shape.dim / sequence
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim / strategy.tp
    ffn = shape.shared_hidden if shape.experts_of(layer) else shape.ffn_hidden
    moved = 2 * tokens * (residual + 2 * heads + _inner_moves(job) * ffn / strategy.tp)
    if shape.experts_of(layer):
        rows = job.routed_tokens * shape.top_k * job.skew
        width = shape.latent_dim or shape.dim
        # rows are gathered at the sender and added up there: each reads and writes
        moved += 2 * rows * (2 * 2 * width + _inner_moves(job) * shape.expert_hidden)
        if ELEMENT_BYTES[strategy.precision] < 2:
            moved += rows * (width + shape.expert_hidden) * (2 + 2 * ELEMENT_BYTES[strategy.precision])
    if ELEMENT_BYTES[strategy.precision] < 2:
        # each operand is read in two bytes and written twice, as is and transposed
        inputs = 2 * shape.dim + (shape.num_heads * shape.head_dim + ffn) / strategy.tp
        moved += tokens * inputs * (2 + 2 * ELEMENT_BYTES[strategy.precision])
    return moved


def _inner_moves(job: Job) -> int:
    """Widths read and written between an FFN's matrices."""
    return 3 if job.shape.gated else 2


def _accumulated_bytes(job: Job, layer: int) -> float:
    """Gradients of a block added to their fp32 accumulators: one read and one write a micro-batch."""
    dense = job.shape.block_params(layer) / job.strategy.tp
    routed = job.shape.routed_params(layer) / (job.strategy.ep * job.strategy.etp)
    return 2 * job.framework.gradient_bytes * (dense + routed)


def head_time(job: Job, engine: Engine) -> BlockTime:
    """Device seconds of the output matrix and the loss for one micro-batch."""
    shape, tp, tokens = job.shape, job.strategy.tp, job.rank_tokens
    heads = 1 + shape.mtp_layers
    product = heads * engine.product_s(tokens, shape.vocab_size / tp, shape.dim, _plain(job.strategy.precision))
    logits = heads * tokens * shape.vocab_size / tp
    loss, gradient = (engine.bytes_s(logits * each) for each in job.framework.loss_moves)
    return BlockTime(
        forward_s=product + loss, backward_s=2 * product + gradient, experts_s=0.0, weights_s=product
    )  # fmt: skip


def optimizer_s(params: float, job: Job, engine: Engine, *, ranks: int) -> float:
    """Seconds of the update of `params` parameters of one rank, `ranks` sharing them under ZeRO.

    Adam reads and writes master weight and two moments, reads the gradient, writes the weight.
    """
    mine = params / (ranks if job.strategy.zero else 1)
    return engine.bytes_s(mine * (2 * job.framework.optimizer_bytes + job.framework.gradient_bytes + 2))


def _plain(precision: str) -> str:
    """The precision of products that low precision leaves alone: router, scores, output matrix."""
    return "bf16" if precision in ("fp8", "fp4") else precision
