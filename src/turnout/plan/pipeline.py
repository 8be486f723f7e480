"""Pipeline stages: which layers a rank holds, how many micro-batches are in flight, what the schedule leaves idle."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from turnout.plan.model import ModelShape
from turnout.plan.terms import Numbers, smaller
from turnout.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one pipeline rank holds, all its chunks together."""

    index: int
    layers: tuple[int, ...]  # blocks, over encoder then decoder
    embedding: bool  # token and position tables
    head: bool  # final norm, output matrix, multi-token prediction
    blocks: tuple[tuple[int, int], ...]  # (a block, how many of `layers` are like it)


@lru_cache(maxsize=4096)
def stages(shape: ModelShape, pp: int, virtual_stages: int = 1, balance: str = "layers") -> tuple[Stage, ...]:
    """The stages of a model cut for `pp` ranks of `virtual_stages` chunks.

    `balance` "layers" gives chunks equal numbers of blocks, the first and the last being the short ones; "flops" lets
    the output matrix count as the blocks it costs as much as (nanotron); with "flops over" a chunk goes on until it has
    more than its share (nanotron before its pipelines were repaired).
    """
    chunks = pp * virtual_stages
    flops = balance.startswith("flops")
    sizes = _by_flops(shape, chunks, over=balance != "flops") if flops else _by_blocks(shape, chunks)
    held: list[list[int]] = [[] for _ in range(pp)]
    start = 0
    for chunk, size in enumerate(sizes):
        held[chunk % pp].extend(range(start, start + size))
        start += size
    return tuple(
        Stage(index=i, layers=tuple(layers), embedding=i == 0, head=i == pp - 1, blocks=_blocks(shape, layers))
        for i, layers in enumerate(held)
    )


@lru_cache(maxsize=4096)
def stage_kinds(
    shape: ModelShape, pp: int, virtual_stages: int = 1, balance: str = "layers"
) -> tuple[tuple[Stage, int], ...]:
    """The stages that differ, and how many are like each; the first of a kind stands for it.

    No later stage of a kind needs more memory, for it has fewer micro-batches in flight.
    """
    kinds: dict[tuple[object, ...], list[Stage]] = {}
    for stage in stages(shape, pp, virtual_stages, balance):
        kinds.setdefault((frozenset(stage.blocks), stage.embedding, stage.head), []).append(stage)
    return tuple((alike[0], len(alike)) for alike in kinds.values())


@lru_cache(maxsize=4096)
def rank_kinds(
    shape: ModelShape, pp: int, virtual_stages: int = 1, balance: str = "layers", *, both_ways: bool = False
) -> tuple[tuple[Stage, Stage | None, int], ...]:
    """(a stage, the one its rank holds beside it, how many ranks hold the like): the ranks that differ.

    A pipeline fed from both ends (DualPipe) puts the stage as far from the end as the first is from the start on the
    same rank, and sends half of the micro-batches each way: DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.1.
    """
    if not both_ways:
        return tuple((stage, None, number) for stage, number in stage_kinds(shape, pp, virtual_stages, balance))
    cut = stages(shape, pp, virtual_stages, balance)
    kinds: dict[tuple[object, ...], list[tuple[Stage, Stage]]] = {}
    for stage, mirror in zip(cut[: pp // 2], cut[::-1], strict=False):
        key = tuple((frozenset(each.blocks), each.embedding, each.head) for each in (stage, mirror))
        kinds.setdefault(key, []).append((stage, mirror))
    return tuple((*pairs[0], 2 * len(pairs)) for pairs in kinds.values())


@lru_cache(maxsize=256)
def like_blocks(shape: ModelShape) -> tuple[int, ...]:
    """For each block the first one like it: as many experts, the same window, the same attentions."""
    beyond = 2 * shape.window + 1  # a length at which a windowed block sees fewer keys than one that sees all
    first: dict[tuple[object, ...], int] = {}
    kinds = [
        (shape.experts_of(i), shape.keys_per_query(i, beyond), shape.encoder_layers > i)
        for i in range(shape.all_layers)
    ]
    return tuple(first.setdefault(kind, i) for i, kind in enumerate(kinds))


def _blocks(shape: ModelShape, layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    like = like_blocks(shape)
    return tuple(Counter(like[layer] for layer in layers).items())


def _by_blocks(shape: ModelShape, chunks: int) -> list[int]:
    """Equal numbers; with blocks that predict further tokens these count too, and each output matrix as one.

    Gives every cut that NVIDIA's recipe of DeepSeek-V3 lists, of 4, 8 and 16 chunks: one block in the last of 16.
    Source: https://github.com/NVIDIA-NeMo/Megatron-Bridge, recipes/deepseek/deepseek_v3.py, layout_map.
    """
    beside = 2 * shape.mtp_layers + 1 if shape.mtp_layers else 0
    sizes = cut_evenly(shape.all_layers + beside, chunks)
    # a last chunk that they fill has no block, and what they need beyond it is the first one's
    lacking = max(0, beside - sizes[-1])
    if lacking >= sizes[0]:
        return cut_evenly(shape.all_layers, chunks)
    sizes[-1] -= beside - lacking
    sizes[0] -= lacking
    return sizes


def cut_evenly(layers: int, chunks: int) -> list[int]:
    """Blocks of each chunk, one after another."""
    base, extra = divmod(layers, chunks)
    sizes = [base] * chunks
    # the middle first: the ends have the embedding and the output matrix to carry
    middle = sorted(range(chunks), key=lambda chunk: abs(2 * chunk - chunks + 1))
    for chunk in middle[:extra]:
        sizes[chunk] += 1
    return sizes


def _by_flops(shape: ModelShape, chunks: int, *, over: bool) -> list[int]:
    """Blocks go to a chunk until it has its share of all matrix products, the output matrix's included; or more.

    Source: https://github.com/huggingface/nanotron, models/base.py, build_model.
    """
    costs = [shape.matrix_weights(layer) for layer in range(shape.all_layers)]
    share = (sum(costs) + shape.vocab_size * shape.dim) / chunks
    sizes, spent, chunk = [0] * chunks, 0.0, 0
    for cost in costs:
        sizes[chunk] += 1
        spent += cost
        # a block that costs more than a share fills one chunk, not several
        full = spent > share * (chunk + 1) if over else spent >= share * (chunk + 1)
        chunk += full and chunk < chunks - 1
    return sizes


def layers_in_flight(stage: Stage, strategy: Strategy, micro_batches: Numbers) -> Numbers:
    """Blocks of `stage` whose activations live at once, micro-batches counted apart.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Megatron-LM schedules.py (warm-up micro-batches);
    DeepSeek-AI 2024, arXiv:2412.19437, table 2 (DualPipe: p + 1).
    """
    p, v, here = strategy.pp, strategy.virtual_stages, len(stage.layers)
    if strategy.schedule == "gpipe":
        return here * micro_batches
    if strategy.schedule == "dualpipe":
        return here * smaller(micro_batches, p + 1)
    if v > 1:
        warm_up = 2 * (p - stage.index - 1) + (v - 1) * p + 1
        return here / v * smaller(micro_batches * v, warm_up)
    return here * smaller(micro_batches, p - stage.index)


def idle_passes(strategy: Strategy, weights: Numbers = 1 / 3) -> Numbers:
    """Time a rank is idle in a step, in micro-batches (forward and backward) of its own stage.

    `weights` is the share of a micro-batch that computes gradients of weights and may wait: W. A pipeline that is fed
    from both ends is `plan.dualpipe`'s.
    Source: 1F1B and interleaved (p-1)/v, arXiv:2104.04473; zero bubble H1 (p-1)(F+B-2W), arXiv:2401.10241, table 2.
    """
    p = strategy.pp
    if strategy.schedule == "zero_bubble":
        return (p - 1) * (1 - 2 * weights) / strategy.virtual_stages
    return (p - 1) / strategy.virtual_stages


def cuts_as_needed(micro_batches: int, schedule: str, pp: int) -> bool:
    """Whether a schedule runs, and its formulas hold, with so many micro-batches."""
    return nearest_cut(micro_batches, schedule, pp) == micro_batches


def nearest_cut(micro_batches: int, schedule: str, pp: int) -> int:
    """The number of micro-batches closest to this one that a schedule runs with.

    Source: Megatron-LM's arguments (interleaved: a multiple of the stages); Qi et al. 2023, arXiv:2401.10241 (as many
    as stages); https://github.com/deepseek-ai/DualPipe (twice as many).
    """
    if schedule == "interleaved":
        return max(1, round(micro_batches / pp)) * pp
    return max(micro_batches, {"zero_bubble": pp, "dualpipe": 2 * pp}.get(schedule, 1))
