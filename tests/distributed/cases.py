"""Layers and training steps on several ranks, each with what one process makes of the same tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, optim

from turnout import MoE, MoEOutput, Strategy, total_loss
from turnout.contracts import CapacityPolicy, Loss, RouterConfig
from turnout.data.sampler import Batch
from turnout.dispatch import Dropless, FixedCapacity, TutelCapacity
from turnout.experts import FFNExperts
from turnout.experts.cut import Cut
from turnout.layers import MoEConfig
from turnout.layers.attention import AttentionConfig, AttentionKind
from turnout.layers.mla import MLAConfig
from turnout.losses import LoadBalance, RouterZ
from turnout.models import Decoder, ModelConfig
from turnout.placement import Placement
from turnout.routers import DeepSeekV3, ExpertChoice, TopK, TopP

DIM, HIDDEN = 6, 5
# ep, etp and r of four ranks
LAYOUTS = (
    *((4, 1, parts) for parts in (-1, 0)),
    *((2, 2, parts) for parts in (0, 1, 2)),
    *((1, 4, parts) for parts in (0, 1, 2, 4)),
    *((2, 1, parts) for parts in (-1, 0)),
)
UNEVEN, EMPTY = (5, 7, 3, 6), (5, 0, 3, 6)
PROGRAMS = ("flat", "hierarchical", "node_dedup", "rank_dedup", "coordinated")
VOCAB, LENGTH = 50, 10
_ALL = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, bias=True, sinks=True, smear_keys=True, qk_norm="head")
ATTENTION: dict[str, AttentionKind] = {
    "grouped": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    "all": _ALL,
    "many": replace(_ALL, num_kv_heads=4),
    "latent": MLAConfig(num_heads=2, q_rank=6, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=6),
}


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One layer on some ranks; without a word it is dropless, ragged and in float64."""

    program: str = "flat"
    ranks: int = 4
    ep: int = 4
    etp: int = 1
    local: int = 4  # ranks of a node
    hidden: int = HIDDEN
    expert: str = "swiglu"
    tokens: tuple[int, ...] = UNEVEN  # of each rank
    num_experts: int = 8
    router: RouterConfig = field(default_factory=lambda: TopK(k=3, init_std=0.5))
    capacity: CapacityPolicy = Dropless()
    backend: str = "loop"
    dtype: torch.dtype = torch.float64
    bias: bool = True
    shared_hidden: int = 0
    latent_dim: int = 0
    crowded: bool = False  # all tokens want the same experts
    padding: bool = False  # every third token is padding
    overlap: int = 1  # chunks
    adaptive_r: int = -1
    bounds: tuple[int, ...] = ()  # of the placement; without them experts lie evenly
    order: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What differs from the plain case."""
        plain = type(self)()
        words = [f"{key}={value}" for key, value in vars(self).items() if str(value) != str(getattr(plain, key))]
        return " ".join(words) or "plain"

    @property
    def strategy(self) -> Strategy:
        sizes = {"ep": self.ep, "etp": self.etp, "adaptive_r": self.adaptive_r}
        return Strategy(**sizes, alltoall=self.program, overlap=self.overlap)

    @property
    def is_padded(self) -> bool:
        """Whether blocks of one size travel."""
        merges = self.program in ("node_dedup", "rank_dedup")
        return (
            self.adaptive_r != 0
            and self.backend == "padded_bmm"
            and not isinstance(self.capacity, Dropless)
            and not merges
            and not placement_of(self).has_copies
        )


def layer_cases() -> Iterator[LayerCase]:
    """Every program on every mesh of four ranks, then one thing changed at a time.

    What does not depend on how rows travel is changed under one program that merges tokens, and one that does not.
    """
    for program in PROGRAMS:
        for local in (1, 2, 4):
            yield LayerCase(program=program, local=local)
        plain = LayerCase(program=program, local=2)
        yield replace(plain, tokens=EMPTY)
        yield replace(plain, crowded=True)
        yield replace(plain, num_experts=6)
        yield replace(plain, capacity=FixedCapacity(factor=1.0), backend="padded_bmm")
        yield replace(plain, ep=2, local=1)
        if program not in ("flat", "node_dedup"):
            continue
        yield replace(plain, tokens=(0, 0, 0, 0))
        yield replace(plain, router=ExpertChoice(k=2, in_decoder="allow"))
        yield replace(plain, router=TopP(p=0.6))
        yield replace(plain, padding=True, shared_hidden=4, latent_dim=3)
        yield replace(plain, backend="padded_bmm")
        yield replace(plain, capacity=TutelCapacity(factor=-1.5), backend="padded_bmm")
        for capacity in (FixedCapacity(factor=1.0), TutelCapacity(factor=-1.5)):
            yield replace(plain, capacity=capacity, tokens=EMPTY)
        yield replace(plain, backend="padded_bmm", capacity=FixedCapacity(), tokens=(0, 0, 0, 0))
        yield replace(plain, backend="padded_bmm", capacity=FixedCapacity(factor=0.8), tokens=EMPTY, num_experts=6)
        yield replace(plain, backend="grouped_mm", dtype=torch.float32)
        yield replace(plain, ep=2, tokens=EMPTY)
        yield replace(plain, ranks=2, ep=2, local=2)
        yield replace(plain, ranks=2, ep=2, local=1, tokens=EMPTY)
    yield LayerCase(ep=1)
    yield LayerCase(ep=1, tokens=EMPTY, backend="grouped_mm", dtype=torch.float32)
    yield from sliced_cases()
    yield from chunked_cases()
    yield from adaptive_cases()
    yield from placed_cases()
    yield from copied_cases()


def chunked_cases() -> Iterator[LayerCase]:
    """Chunks whose exchange overlaps, under every program; more of them than some ranks have tokens."""
    for program in PROGRAMS:
        for overlap in (2, 8):
            yield LayerCase(program=program, local=2, overlap=overlap, tokens=(11, 0, 3, 6))
        blocks = LayerCase(program=program, local=2, capacity=FixedCapacity(factor=1.0), backend="padded_bmm")
        yield replace(blocks, overlap=4)
        yield LayerCase(program=program, ep=2, etp=2, hidden=6, overlap=4)
    yield LayerCase(overlap=4, backend="grouped_mm", dtype=torch.float32)
    yield LayerCase(overlap=2, router=ExpertChoice(k=2, in_decoder="allow"))
    yield LayerCase(overlap=2, router=TopP(p=0.6), padding=True, shared_hidden=4, latent_dim=3)
    yield LayerCase(overlap=4, capacity=FixedCapacity(factor=0.5), program="node_dedup", local=1)
    yield LayerCase(overlap=2, ep=1)
    yield LayerCase(overlap=2, backend="padded_bmm", crowded=True)


def adaptive_cases() -> Iterator[LayerCase]:
    """Every r: weights gathered within parts of an expert, or all of them where tokens stay."""
    for parts in (0, 1, 2):
        yield LayerCase(ep=1, etp=4, hidden=8, adaptive_r=parts, tokens=EMPTY)
    for parts in (0, 1):
        sliced = LayerCase(ep=2, etp=2, hidden=6, adaptive_r=parts)
        yield replace(sliced, program="hierarchical", local=2, num_experts=5, overlap=2)
        yield replace(sliced, capacity=FixedCapacity(factor=1.0), backend="padded_bmm", tokens=EMPTY)
        yield replace(sliced, program="node_dedup", local=2, expert="gelu", padding=True, shared_hidden=4, latent_dim=3)
        yield replace(sliced, backend="grouped_mm", dtype=torch.float32, overlap=4)
        yield replace(sliced, ep=1, backend="auto", dtype=torch.float32)
    yield LayerCase(adaptive_r=0, num_experts=6, local=2)
    yield LayerCase(adaptive_r=0, ep=2, tokens=(0, 0, 0, 0))


def crossed_cases() -> Iterator[LayerCase]:
    """Everything with everything: layouts and r, programs, chunks, ragged and padded, one node and two."""
    for (ep, etp, parts), program, overlap, local in product(LAYOUTS, PROGRAMS, (1, 2, 4, 8), (2, 4)):
        case = LayerCase(ep=ep, etp=etp, adaptive_r=parts, program=program, overlap=overlap, local=local, hidden=8)
        # experts that ranks do not divide, and ranks with fewer tokens than chunks
        case = replace(case, num_experts=6 if overlap == 4 else 8, tokens=(11, 0, 3, 6))
        yield case
        yield replace(case, capacity=FixedCapacity(factor=1.0), backend="padded_bmm")


def placed_cases() -> Iterator[LayerCase]:
    """Experts in another order, and more of them on some ranks, under every program; then one thing changed."""
    mixed, uneven = (5, 2, 7, 0, 1, 6, 3, 4), (0, 1, 4, 6, 8)
    for program in PROGRAMS:
        yield LayerCase(program=program, local=2, order=mixed, tokens=EMPTY)
        blocks = LayerCase(program=program, local=2, capacity=FixedCapacity(factor=1.0), backend="padded_bmm")
        yield replace(blocks, order=mixed, bounds=uneven, overlap=2)
        yield LayerCase(program=program, ep=2, etp=2, hidden=6, order=mixed, bounds=(0, 3, 8), expert="gelu")
    yield LayerCase(order=mixed, router=ExpertChoice(k=2, in_decoder="allow"), overlap=2)
    yield LayerCase(order=mixed, bounds=uneven, backend="grouped_mm", dtype=torch.float32)
    yield LayerCase(order=mixed, bounds=uneven, adaptive_r=0)
    yield LayerCase(order=mixed, ep=2, etp=2, hidden=6, adaptive_r=0)
    yield LayerCase(order=mixed, ep=2, etp=2, hidden=6, adaptive_r=1, backend="padded_bmm")


def copied_cases() -> Iterator[LayerCase]:
    """Experts that stand on several ranks: 0 on three, 4 on both nodes, 2 on one; under every program."""
    spread, even = (0, 1, 2, 3, 0, 4, 5, 0, 6, 7, 4, 1, 2), (0, 3, 6, 9, 13)
    for program in PROGRAMS:
        for local in (1, 2):
            yield LayerCase(program=program, local=local, order=spread, bounds=even, tokens=(11, 0, 3, 6))
        copies = LayerCase(program=program, local=2, order=spread, bounds=even, crowded=True)
        yield replace(copies, overlap=4, capacity=FixedCapacity(factor=1.0), backend="padded_bmm")
        pair = LayerCase(program=program, ep=2, order=(0, 1, 2, 3, 4, 2, 5, 6, 7, 0), bounds=(0, 5, 10))
        yield replace(pair, etp=2, hidden=6, tokens=EMPTY)
        yield replace(pair, local=1)
    copies = LayerCase(local=2, order=spread, bounds=even)
    yield replace(copies, tokens=(0, 0, 0, 0))
    yield replace(copies, router=ExpertChoice(k=2, in_decoder="allow"), overlap=2)
    yield replace(copies, router=TopP(p=0.6), padding=True, shared_hidden=4, latent_dim=3)
    yield replace(copies, backend="grouped_mm", dtype=torch.float32, tokens=(9, 7, 1, 2))
    yield replace(copies, adaptive_r=0)
    # all of them everywhere
    yield LayerCase(ranks=2, ep=2, local=2, order=(0, 1, 2, 3) * 2, bounds=(0, 4, 8), num_experts=4)


def sliced_cases() -> Iterator[LayerCase]:
    """Experts cut over ranks: under every program, then one thing changed at a time."""
    few = TopK(k=2, init_std=0.5)
    for program in PROGRAMS:
        sliced = LayerCase(program=program, ep=2, etp=2, hidden=6)
        yield sliced
        yield replace(sliced, local=2, tokens=EMPTY)
        yield replace(sliced, capacity=FixedCapacity(factor=1.0), backend="padded_bmm", tokens=EMPTY)
        yield replace(sliced, ep=1, etp=4, hidden=8)
        if program not in ("flat", "rank_dedup"):
            continue
        yield replace(sliced, ep=1)
        yield replace(sliced, ep=1, local=1, num_experts=1, router=TopK(k=1, renormalize=False))
        yield replace(sliced, num_experts=2, router=few, crowded=True)
        yield replace(sliced, num_experts=5, tokens=(0, 0, 0, 0))
        yield replace(sliced, expert="gelu", padding=True, shared_hidden=4, latent_dim=3)
        yield replace(sliced, backend="padded_bmm")
        for backend in ("grouped_mm", "threaded_mm", "auto"):
            yield replace(sliced, backend=backend, dtype=torch.float32)


def kernel_cases() -> Iterator[LayerCase]:
    """Every program, on one node and on two."""
    for program in PROGRAMS:
        for local in (2, 4):
            yield LayerCase(program=program, local=local, tokens=EMPTY)


def build(case: LayerCase) -> MoE:
    """The whole layer, the same for everybody."""
    torch.manual_seed(3)
    layer = MoE(
        DIM,
        case.hidden,
        case.num_experts,
        expert=case.expert,
        router=case.router,
        capacity=case.capacity,
        backend=case.backend,
        bias=case.bias,
        shared_hidden=case.shared_hidden,
        latent_dim=case.latent_dim,
        losses=(LoadBalance(coefficient=0.3), RouterZ(coefficient=0.2)),
        init_std=0.7,
    )
    for name, weight in layer.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(weight)
    return layer.to(case.dtype)


def cuts_of(case: LayerCase, layer: MoE) -> dict[str, Cut]:
    """How the weights of the experts lie on the ranks that share them."""
    assert isinstance(layer.experts, FFNExperts)
    return layer.experts.cuts(placement_of(case), case.etp)


def placement_of(case: LayerCase) -> Placement:
    """Where the experts lie."""
    return Placement(case.bounds or Placement.even(case.num_experts, case.ep).bounds, case.order)


def placement_to(where: tuple[Any, ...], ranks: int) -> Placement:
    """A placement of a training case."""
    return Placement.of(where, ranks) if isinstance(where[0], int) else Placement.holding(where)


@dataclass(frozen=True, kw_only=True)
class RankInputs:
    """What one rank feeds its layer."""

    x_TD: Tensor
    y_grad_TD: Tensor
    mask_T: Tensor | None


def inputs_of(case: LayerCase, rank: int) -> RankInputs:
    g = torch.Generator().manual_seed(100 + rank)
    shape = (case.tokens[rank], DIM)
    x_TD = torch.randn(shape, generator=g, dtype=torch.float64)
    if case.crowded:
        x_TD = torch.linspace(-1, 1, DIM, dtype=torch.float64) + 0.01 * x_TD
    y_grad_TD = torch.randn(shape, generator=g, dtype=torch.float64)
    mask_T = torch.arange(shape[0]) % 3 != 2 if case.padding else None
    return RankInputs(x_TD=x_TD.to(case.dtype), y_grad_TD=y_grad_TD.to(case.dtype), mask_T=mask_T)


def passed(layer: MoE, inputs: RankInputs) -> tuple[MoEOutput, Tensor]:
    """Forward and backward; returns the output and the input's gradient."""
    x_TD = inputs.x_TD.clone().requires_grad_()
    out = layer(x_TD, mask=inputs.mask_T)
    ((out.y * inputs.y_grad_TD).sum() + total_loss(out.losses)).backward()
    assert x_TD.grad is not None
    return out, x_TD.grad


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """Steps of a small decoder on some ranks."""

    ranks: int = 4
    ep: int = 4
    etp: int = 1
    local: int = 4
    zero: Literal[0, 3] = 0
    zero_size: int = 0
    zero_sum: Literal["micro_batch", "step"] = "micro_batch"
    program: str = "flat"
    overlap: int = 1
    adaptive_r: int = -1
    tp: int = 1
    sequence_parallel: bool = False
    tp_overlap: int = 1
    symmetric: bool = False  # torch's fused operators, as they are where GPUs reach each other's memory
    shard_tokens: bool = False
    folded: bool = False
    pieces: bool = False  # a group of tensor-parallel ranks has one sequence alone, which they cut
    attention: str = "grouped"
    switches: tuple[tuple[str, int, int], ...] = ()  # program, chunks and r before each step
    bias: bool = False
    accumulate: int = 1
    adam: bool = False
    adam_eps: float = 1e-8
    dtype: torch.dtype = torch.float64
    router: RouterConfig = field(default_factory=lambda: TopK(k=2, init_std=0.5))
    losses: tuple[Loss, ...] = (LoadBalance(coefficient=0.1), RouterZ(coefficient=0.1))
    capacity: CapacityPolicy = Dropless()
    num_experts: int = 8
    in_parts: bool = False  # no rank ever makes the whole model
    idle_rank: bool = False  # the last rank has nothing but padding
    # from each step on the rank of each expert, or the experts of each rank; empty: as before
    moves: tuple[tuple[Any, ...], ...] = ()
    expert_copies: int = 0
    pp: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    backend: str = "auto"
    steps: int = 2

    name = LayerCase.name

    @property
    def strategy(self) -> Strategy:
        sizes = {"ep": self.ep, "etp": self.etp, "zero": self.zero, "zero_size": self.zero_size}
        sizes |= {"adaptive_r": self.adaptive_r, "tp": self.tp, "folded": self.folded}
        sizes |= {"sequence_parallel": self.sequence_parallel, "shard_tokens": self.shard_tokens}
        sizes |= {"tp_overlap": self.tp_overlap, "zero_sum": self.zero_sum, "expert_copies": self.expert_copies}
        sizes |= {"pp": self.pp, "schedule": self.schedule, "virtual_stages": self.virtual_stages}
        return Strategy(**sizes, alltoall=self.program, overlap=self.overlap)

    @property
    def with_text(self) -> int:
        """Ranks of a stage: those of the others get what these make of it."""
        return self.ranks // self.pp


def train_cases() -> Iterator[TrainCase]:
    """Accumulation, optimizers, precision, degrees, and what needs the whole step's counts."""
    plain = TrainCase()
    yield plain
    yield replace(plain, accumulate=2, adam=True)
    yield replace(plain, accumulate=4, steps=1)
    yield replace(plain, dtype=torch.float32, program="node_dedup", local=2, accumulate=2)
    for program in ("hierarchical", "node_dedup"):
        yield replace(plain, program=program, local=2, adam=True)
    yield replace(plain, ep=2, adam=True)
    yield replace(plain, ep=1, adam=True)
    yield replace(plain, idle_rank=True, accumulate=2)
    yield replace(plain, idle_rank=True, ep=2, program="rank_dedup")
    yield replace(plain, router=DeepSeekV3(k=2, bias_step=0.1), losses=(), steps=3)
    yield replace(plain, losses=(LoadBalance(coefficient=0.1, scope="global"),), accumulate=2, ep=2)
    yield replace(plain, losses=(LoadBalance(coefficient=0.1, scope="data_parallel"),), ranks=2, ep=2)
    yield replace(plain, capacity=FixedCapacity(factor=1.0, in_decoder="allow"), ep=2)
    for ep, etp in ((2, 2), (1, 4), (1, 2)):
        yield replace(plain, ep=ep, etp=etp, adam=True, bias=True, steps=3)
    yield replace(plain, overlap=2, accumulate=2, adam=True, idle_rank=True)
    yield replace(plain, overlap=4, program="node_dedup", local=2, zero=3)
    yield replace(plain, adaptive_r=0, zero=3, adam=True, bias=True)
    to_and_fro = (("flat", 1, 4), ("rank_dedup", 2, 1), ("flat", 1, 0), ("hierarchical", 4, 2), ("flat", 2, 4))
    yield TrainCase(ep=1, etp=4, adam=True, bias=True, steps=5, switches=to_and_fro)
    yield TrainCase(ep=2, adam=True, accumulate=2, switches=(("node_dedup", 8, 1), ("flat", 1, 0)))
    for sizes in (
        {"ep": 2, "zero": 3},
        {"ep": 2, "etp": 2, "bias": True},
        {"ep": 1, "tp": 2, "zero": 3, "attention": "many"},
    ):
        yield replace(plain, in_parts=True, steps=1, **sizes)
    # some ranks have one expert more than others
    yield replace(plain, num_experts=6, program="hierarchical", local=2, adam=True)
    yield replace(plain, num_experts=5, ep=2, zero=3, accumulate=2)
    yield from sharded_cases()
    yield from tensor_cases()
    yield from moving_cases()
    yield from copying_cases()


def copying_cases() -> Iterator[TrainCase]:
    """Experts with copies from the start, others later, fewer, and none; with all that a step has."""
    four = (
        ((0, 1, 6), (2, 0, 3), (4, 5, 0), (6, 7, 0)),
        ((0, 1), (5, 3, 2), (4, 5), (7, 6, 5)),
        (0, 0, 1, 1, 2, 2, 3, 3),
    )
    plain = TrainCase(expert_copies=4, local=2, steps=5, moves=((), *four), bias=True)
    yield replace(plain, adam=True, accumulate=2)
    yield replace(plain, program="node_dedup", overlap=2, idle_rank=True)
    yield replace(plain, program="hierarchical", adam=True, dtype=torch.float32, steps=4)
    yield replace(plain, zero=3, adam=True)
    pairs = ((), ((0, 1, 2, 3, 7), (4, 5, 6, 7, 3)), ((6, 1, 2, 3, 7), (4, 5, 6, 7, 0)))
    two = TrainCase(ep=2, expert_copies=2, moves=pairs, steps=4, bias=True)
    yield replace(two, adam=True, program="rank_dedup", losses=(LoadBalance(coefficient=0.1, scope="global"),))
    yield replace(two, etp=2, adam=True)
    yield replace(two, tp=2, attention="all", shard_tokens=True, adam=True)
    yield TrainCase(ep=2, expert_copies=3, num_experts=5, switches=(("flat", 1, 1), ("rank_dedup", 2, 0)))
    yield TrainCase(ranks=2, ep=2, local=2, expert_copies=8, adam=True, steps=3)


def moving_cases() -> Iterator[TrainCase]:
    """Experts change their ranks between steps: evenly, then more on some ranks, then home; with all that is kept."""
    even, uneven, home = (3, 0, 2, 1, 1, 2, 0, 3), (0, 3, 3, 0, 1, 3, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)
    plain = TrainCase(moves=((), even, uneven, home), steps=5, local=2)
    yield replace(plain, adam=True, bias=True)
    yield replace(plain, program="node_dedup", overlap=2, accumulate=2)
    yield replace(plain, zero=3, adam=True, program="hierarchical")
    halves = ((), (1, 0, 1, 0, 0, 1, 0, 1), (1, 0, 0, 0, 0, 1, 0, 0))
    yield TrainCase(ep=2, etp=2, moves=halves, adam=True, bias=True, steps=4)
    yield TrainCase(ep=2, moves=halves, adam=True, steps=4, switches=(("flat", 1, 1), *[("rank_dedup", 2, 0)] * 3))
    yield TrainCase(ep=2, tp=2, attention="all", shard_tokens=True, moves=halves, adam=True, steps=4)


def tensor_cases() -> Iterator[TrainCase]:
    """Attention and dense layers over ranks, with the experts' axes folded on the same ones: tokens whole, each rank's
    share of them dispatched, and sequence parallel.
    """
    stepwise = (LoadBalance(coefficient=0.1, scope="global"), RouterZ(coefficient=0.1))
    plain = TrainCase(tp=2, ep=1, attention="all", bias=True)
    for tokens in ({}, {"shard_tokens": True}, {"sequence_parallel": True}):
        case = replace(plain, **tokens)
        yield replace(case, ranks=2, ep=2, local=2, folded=True, adam=True)
        yield replace(case, ep=2, adam=True, accumulate=2)
        yield replace(case, ep=4, folded=True, local=2, program="hierarchical", overlap=2, idle_rank=True)
        yield replace(case, ep=2, losses=stepwise, accumulate=2, dtype=torch.float32)
    # a curve: what is wrong in the last digits of a step would be wrong in the first ones of its end
    yield replace(plain, ep=4, folded=True, sequence_parallel=True, steps=24)
    yield replace(plain, ranks=2)
    yield replace(plain, ranks=2, sequence_parallel=True, accumulate=2)
    balanced = replace(plain, router=DeepSeekV3(k=2, bias_step=0.1), losses=(), attention="latent", ep=2, steps=3)
    yield balanced
    yield replace(balanced, sequence_parallel=True, folded=True, program="rank_dedup")
    yield replace(plain, capacity=FixedCapacity(factor=1.0, in_decoder="allow"), ep=2, shard_tokens=True)
    yield replace(plain, ep=2, etp=2, shard_tokens=True)
    yield replace(plain, ep=1, etp=4, adaptive_r=2, folded=True, sequence_parallel=True, adam=True)
    fused = replace(plain, sequence_parallel=True, ep=4, folded=True)
    yield replace(fused, tp_overlap=4, adam=True, accumulate=2)
    yield replace(fused, tp_overlap=2, symmetric=True, attention="latent")
    yield replace(fused, tp_overlap=3, attention="latent", bias=False, dtype=torch.float32)
    # ten tokens over four ranks
    pieces = TrainCase(tp=4, attention="many", sequence_parallel=True, pieces=True, losses=stepwise, folded=True)
    yield replace(pieces, accumulate=2, adam=True)
    yield replace(pieces, ep=2, bias=True, dtype=torch.float32)
    yield replace(pieces, tp_overlap=2, bias=True)


def sharded_cases() -> Iterator[TrainCase]:
    """FSDP2: without shared experts, with copies of those that are, and with none of them."""
    for ep in (1, 2):
        yield TrainCase(zero=3, ep=ep, adam=True, bias=True)
    stepwise = LoadBalance(coefficient=0.1, scope="global")
    yield TrainCase(zero=3, ep=2, accumulate=2, idle_rank=True, losses=(stepwise,))
    yield TrainCase(zero=3, zero_size=2, ep=4, local=2, program="node_dedup", adam=True, accumulate=2)
    yield TrainCase(zero=3, zero_sum="step", ep=2, accumulate=3, adam=True)
    # beside tensor parallel: parts of dense weights in shards over the data axis, experts over all that have them
    tensor = TrainCase(zero=3, tp=2, ep=2, attention="all", bias=True, adam=True)
    yield tensor
    yield replace(tensor, ep=1, sequence_parallel=True, tp_overlap=2, accumulate=2, idle_rank=True)
    yield replace(tensor, ep=4, folded=True, shard_tokens=True, zero_size=2, adam=False, dtype=torch.float32)


def config_of(case: TrainCase) -> ModelConfig:
    moe = MoEConfig(
        num_experts=case.num_experts,
        hidden=8,
        router=case.router,
        losses=case.losses,
        capacity=case.capacity,
        bias=case.bias,
        backend=case.backend,
    )
    config = ModelConfig(
        vocab_size=VOCAB, dim=16, num_layers=2 * case.pp, max_seq_len=32, attention=ATTENTION[case.attention], moe=moe
    )
    if case.tp > 1:
        # a dense block before, and a dense network beside the experts
        wider = replace(moe, shared_hidden=4)
        layers = config.num_layers + 1
        config = replace(config, moe=wider, num_layers=layers, dense_first=1, hidden=12, ffn_bias=case.bias)
    return replace(config, init_std=0.2)


def decoder(case: TrainCase) -> Decoder:
    """The whole model, the same for everybody."""
    torch.manual_seed(0)
    model = Decoder(config_of(case)).to(case.dtype)
    if case.tp > 1 and not case.in_parts:
        for name, weight in model.named_parameters():
            if "bias" in name or name.endswith(("sink_H", "smear_H")):
                torch.nn.init.normal_(weight)
    return model


def optimizer(case: TrainCase, model: Decoder) -> optim.Optimizer:
    if case.adam:
        return optim.AdamW(model.parameters(), lr=0.01, eps=case.adam_eps)
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def parts(case: TrainCase, step: int) -> list[Batch]:
    """The micro-batches of a step: `accumulate` for each rank in turn."""
    g = torch.Generator().manual_seed(50 + step)
    made = []
    for number in range(case.with_text * case.accumulate):
        tokens_BS = torch.randint(VOCAB, (2, LENGTH + 1), generator=g)
        padding_B = torch.tensor([0, number % 4]) if not _is_idle(case, number) else torch.full((2,), LENGTH)
        mask_BS = torch.arange(LENGTH) < (LENGTH - padding_B).unsqueeze(1)
        targets_BS = tokens_BS[:, 1:].masked_fill(~mask_BS, -100)
        made.append(Batch(tokens_BS=tokens_BS[:, :-1].contiguous(), targets_BS=targets_BS, mask_BS=mask_BS))
    return made


def texts(case: TrainCase, step: int) -> list[list[Batch]]:
    """The micro-batches of a step by those whose they are: ranks, or groups of tensor-parallel ranks that share one."""
    made, groups = parts(case, step), []
    for first in range(0, case.with_text, case.tp):
        of_ranks = [
            made[rank * case.accumulate : (rank + 1) * case.accumulate] for rank in range(first, first + case.tp)
        ]
        groups.append([_together(case, batches) for batches in zip(*of_ranks, strict=True)])
    return groups


def _together(case: TrainCase, batches: Sequence[Batch]) -> Batch:
    number = 1 if case.pieces else None
    fields = ("tokens_BS", "targets_BS", "mask_BS")
    return Batch(**{name: torch.cat([getattr(batch, name) for batch in batches])[:number] for name in fields})


def in_turn(case: TrainCase, step: int) -> list[Batch]:
    """The same for one process: whoever routes tokens by himself has a micro-batch of his own."""
    if case.sequence_parallel and not case.pieces:
        return parts(case, step)
    return [batch for group in texts(case, step) for batch in group]


def _is_idle(case: TrainCase, number: int) -> bool:
    return case.idle_rank and number // case.accumulate == case.with_text - 1


def worst(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; infinite where shapes differ or something is not finite."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return math.inf
    if want.numel() == 0:
        return 0.0
    scale = max(float(want.abs().max()), 1e-3)
    return float((got.double() - want.double()).abs().max()) / scale


def tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 1e-5


def by_world(cases: Sequence[LayerCase | TrainCase]) -> dict[int, list[LayerCase | TrainCase]]:
    """The cases by number of ranks, most first."""
    sizes = sorted({case.ranks for case in cases}, reverse=True)
    return {size: [case for case in cases if case.ranks == size] for size in sizes}
