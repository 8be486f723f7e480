"""Seconds that the arithmetic of one block takes on one device: products, attention, element-wise work, optimizer."""

from dataclasses import dataclass

from turnout.plan.engine import Engine
from turnout.plan.job import Job
from turnout.plan.moved_bytes import accumulated_bytes, elementwise_bytes, ffn_bytes, light_bytes


@dataclass(frozen=True, kw_only=True)
class BlockTime:
    """Device seconds of one block for one micro-batch, communication left out."""

    forward_s: float
    backward_s: float  # without what recomputation repeats
    experts_s: float  # of the forward pass, products of routed experts
    scores_s: float = 0.0  # of the forward pass, what selective recomputation repeats
    light_s: float = 0.0  # of the forward pass, what light recomputation repeats
    weights_s: float = 0.0  # of the backward pass, gradients of weights


def products_of(job: Job, layer: int) -> list[tuple[float, float, float]]:
    """(m, n, k) of the dense products of block `layer` for one micro-batch on one rank, forward."""
    return [*_attention_products(job), *_ffn_products(job, layer)]


def _ffn_products(job: Job, layer: int) -> list[tuple[float, float, float]]:
    """Of a dense FFN, or of what every token meets beside the routed experts."""
    shape, tp, tokens = job.shape, job.strategy.tp, job.rank_tokens
    hidden = shape.shared_hidden if shape.experts_of(layer) else shape.ffn_hidden
    up = (2 if shape.gated else 1) * hidden
    return [(tokens, up / tp, shape.dim), (tokens, shape.dim, hidden / tp)] if hidden else []


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
    elementwise = engine.bytes_s(elementwise_bytes(job, layer))
    accumulate = engine.bytes_s(accumulated_bytes(job, layer))
    return BlockTime(
        forward_s=dense + experts + scores_forward + elementwise,
        backward_s=2 * (dense + experts) + scores_backward + 1.5 * elementwise + accumulate,
        experts_s=experts,
        scores_s=scores_forward,
        light_s=engine.bytes_s(light_bytes(job, layer)) + _up_projections_s(job, engine),
        weights_s=dense + experts + accumulate,
    )


def layer_time(job: Job, layer: int, engine: Engine) -> tuple[float, float]:
    """(forward, backward) device seconds of the FFN or the experts of block `layer` by themselves.

    Without attention, norms and residuals; gradients are written, not added to others.
    """
    dense = sum(engine.product_s(*product, job.strategy.precision) for product in _ffn_products(job, layer))
    products = dense + _experts_s(job, layer, engine)
    elementwise = engine.bytes_s(ffn_bytes(job, layer))
    return products + elementwise, 2 * products + 1.5 * elementwise


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
    width, hidden = shape.latent_dim or shape.dim, shape.expert_hidden / max(1, strategy.expert_parts)
    local = num_experts / strategy.ep * job.crowding if strategy.expert_parts else num_experts
    rows = job.expert_rows / local
    up = (2 if shape.gated else 1) * hidden
    one = engine.product_s(rows, up, width, strategy.precision, grouped=True)
    one += engine.product_s(rows, width, hidden, strategy.precision, grouped=True)
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
