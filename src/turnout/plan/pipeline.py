"""Pipeline stages: which layers a rank holds, how many micro-batches are in flight, what the schedule leaves idle."""

from dataclasses import dataclass
from functools import lru_cache

from turnout.plan.model import ModelShape
from turnout.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one pipeline rank holds, all its chunks together."""

    index: int
    layers: tuple[int, ...]  # blocks, over encoder then decoder
    embedding: bool  # token and position tables
    head: bool  # final norm, output matrix, multi-token prediction


@lru_cache(maxsize=4096)
def stages(shape: ModelShape, pp: int, virtual_stages: int = 1, balance: str = "layers") -> tuple[Stage, ...]:
    """The stages of a model cut for `pp` ranks of `virtual_stages` chunks.

    `balance` "layers" gives chunks equal numbers of blocks, the first and the last being the short ones; "flops" lets
    the output matrix count as the blocks it costs as much as (nanotron).
    """
    chunks = pp * virtual_stages
    sizes = _by_flops(shape, chunks) if balance == "flops" else _by_layers(shape.all_layers, chunks)
    held: list[list[int]] = [[] for _ in range(pp)]
    start = 0
    for chunk, size in enumerate(sizes):
        held[chunk % pp].extend(range(start, start + size))
        start += size
    return tuple(
        Stage(index=i, layers=tuple(layers), embedding=i == 0, head=i == pp - 1) for i, layers in enumerate(held)
    )


def _by_layers(layers: int, chunks: int) -> list[int]:
    base, extra = divmod(layers, chunks)
    sizes = [base] * chunks
    # the middle first: the ends have the embedding and the output matrix to carry
    middle = sorted(range(chunks), key=lambda chunk: abs(2 * chunk - chunks + 1))
    for chunk in middle[:extra]:
        sizes[chunk] += 1
    return sizes


def _by_flops(shape: ModelShape, chunks: int) -> list[int]:
    """Blocks go to a chunk until it has its share of all matrix products, the output matrix's included."""
    costs = [shape.matrix_weights(layer) for layer in range(shape.all_layers)]
    share = (sum(costs) + shape.vocab_size * shape.dim) / chunks
    sizes, spent = [0] * chunks, 0.0
    for cost in costs:
        sizes[min(chunks - 1, int((spent + cost / 2) / share))] += 1
        spent += cost
    return sizes


def layers_in_flight(stage: Stage, strategy: Strategy, micro_batches: int) -> float:
    """Blocks of `stage` whose activations live at once, micro-batches counted apart.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Megatron-LM schedules.py (warm-up micro-batches);
    DeepSeek-AI 2024, arXiv:2412.19437, table 2 (DualPipe: p + 1).
    """
    p, v, here = strategy.pp, strategy.virtual_stages, len(stage.layers)
    if strategy.schedule == "gpipe":
        return here * micro_batches
    if strategy.schedule == "dualpipe":
        return here * min(micro_batches, p + 1)
    if v > 1:
        warm_up = 2 * (p - stage.index - 1) + (v - 1) * p + 1
        return here / v * min(micro_batches * v, warm_up)
    return here * min(micro_batches, p - stage.index)


def idle_passes(strategy: Strategy) -> float:
    """Time a rank is idle in a step, in micro-batches (forward and backward) of its own stage.

    Source: 1F1B and interleaved (p-1)/v, arXiv:2104.04473; zero bubble H1 (p-1)/3 with F = B = W, Qi et al. 2023,
    arXiv:2401.10241, table 2; DualPipe (p/2-1)/3, arXiv:2412.19437, table 2.
    """
    p = strategy.pp
    if strategy.schedule == "zero_bubble":
        return (p - 1) / 3 / strategy.virtual_stages
    if strategy.schedule == "dualpipe":
        return max(0.0, p / 2 - 1) / 3
    return (p - 1) / strategy.virtual_stages
