"""Training steps of a small decoder in pipeline stages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import optim

from tests.distributed.cases import ATTENTION, LENGTH, VOCAB, LayerCase
from turnout import Strategy
from turnout.contracts import Loss, RouterConfig
from turnout.data.sampler import Batch
from turnout.layers import MoEConfig
from turnout.losses import LoadBalance, RouterZ
from turnout.models import Decoder, ModelConfig
from turnout.routers import DeepSeekV3, TopK

SEQUENCES = 2  # of a micro-batch


@dataclass(frozen=True, kw_only=True)
class StageCase:
    """Steps on some ranks; without a word in two stages of three blocks, the first of them dense, in float64."""

    ranks: int = 2
    pp: int = 2
    virtual_stages: int = 1
    schedule: str = "1f1b"
    tp: int = 1
    ep: int = 1
    etp: int = 1
    folded: bool = False
    shard_tokens: bool = False
    zero: int = 0
    zero_size: int = 0
    program: str = "flat"
    overlap: int = 1
    local: int = 4
    layers: int = 3
    dense_first: int = 1
    tied: bool = True
    positions: str = "rope"
    accumulate: int = 2
    losses: tuple[Loss, ...] = (LoadBalance(coefficient=0.1), RouterZ(coefficient=0.1))
    router: RouterConfig = TopK(k=2)
    adam: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = 3
    idle_rank: bool = False  # the last of those with a text has padding alone

    name = LayerCase.name

    @property
    def strategy(self) -> Strategy:
        names = ("pp", "virtual_stages", "schedule", "tp", "ep", "etp", "folded", "shard_tokens", "overlap")
        names += ("zero", "zero_size")
        return Strategy(**{name: getattr(self, name) for name in names}, alltoall=self.program)

    @property
    def texts(self) -> int:
        """Ranks of a stage, or groups of tensor-parallel ones: each has a text of its own."""
        return self.ranks // self.pp // self.tp


def stage_cases() -> Iterator[StageCase]:
    """Schedules, numbers of stages and micro-batches, uneven cuts; losses over every scope; data and expert parallel
    ranks in each stage.
    """
    two, four = StageCase(), StageCase(ranks=4)
    yield two
    yield replace(two, accumulate=4, adam=True, layers=2, dense_first=0)
    yield replace(two, tied=False, positions="learned", adam=True)
    yield replace(two, schedule="gpipe", accumulate=1)
    yield replace(two, schedule="interleaved", virtual_stages=2, accumulate=3, layers=5)
    yield replace(two, schedule="zero_bubble", accumulate=4)
    yield replace(two, dtype=torch.float32, accumulate=4)
    yield replace(two, dtype=torch.float32, schedule="zero_bubble", accumulate=4)
    yield replace(two, router=DeepSeekV3(k=2, bias_step=0.1), losses=())
    yield replace(two, layers=4, dense_first=4, losses=())
    # a curve: what is wrong in the last digits of a step would be wrong in the first ones of its end
    yield replace(two, steps=50, adam=True)
    yield four
    yield replace(four, idle_rank=True, adam=True)
    yield replace(four, pp=4, accumulate=4, layers=6, dense_first=2)
    yield replace(four, pp=4, accumulate=5, layers=8, virtual_stages=2, schedule="zero_bubble", tied=False)
    yield replace(four, ep=2, adam=True, idle_rank=True)
    yield replace(four, ep=2, program="hierarchical", local=1, overlap=2, accumulate=4)
    yield replace(four, etp=2, schedule="gpipe", accumulate=3)
    yield replace(four, ep=2, schedule="zero_bubble", accumulate=4)
    yield replace(four, ep=2, schedule="interleaved", virtual_stages=2, layers=4, adam=True)
    yield replace(four, ep=2, losses=(LoadBalance(coefficient=0.1, scope="global"),))
    yield replace(four, losses=(LoadBalance(coefficient=0.1, scope="sequence"),), dtype=torch.float32)
    for loss in (LoadBalance(coefficient=0.1, scope="data_parallel"), LoadBalance(coefficient=0.1, scope="global")):
        yield replace(four, schedule="gpipe", accumulate=1, losses=(loss,))
    yield replace(four, tp=2)
    yield replace(four, tp=2, ep=2, folded=True, adam=True, schedule="interleaved", virtual_stages=2, layers=5)
    yield replace(four, tp=2, ep=2, folded=True, shard_tokens=True, losses=(LoadBalance(scope="global"),))
    yield replace(four, zero=3, adam=True, accumulate=4)
    yield replace(four, zero=3, ep=2, idle_rank=True, tied=False)
    yield replace(four, zero=3, etp=2, schedule="gpipe", accumulate=3)
    yield replace(four, zero=3, schedule="interleaved", virtual_stages=2, layers=5, dtype=torch.float32)


def eight_cases() -> Iterator[StageCase]:
    """What only so many ranks have: stages, tensor parallel and shards at once; several copies of the shards."""
    eight = StageCase(ranks=8, local=8, zero=3)
    yield replace(eight, tp=2, adam=True)
    yield replace(eight, tp=2, ep=2, folded=True)
    yield replace(eight, ep=2)
    yield replace(eight, zero_size=2)


def staged_decoder(case: StageCase) -> Decoder:
    """The whole model, the same for everybody."""
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=8, hidden=8, router=case.router, losses=case.losses, bias=True, shared_hidden=4)
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=case.layers,
        max_seq_len=32,
        attention=ATTENTION["many" if case.tp > 1 else "grouped"],
        positions="learned" if case.positions == "learned" else "rope",
        hidden=12,
        moe=moe,
        dense_first=case.dense_first,
        tie_embeddings=case.tied,
        init_std=0.2,
    )
    return Decoder(config).to(case.dtype)


def optimizer_of(case: StageCase, model: Decoder) -> optim.Optimizer:
    if case.adam:
        return optim.AdamW(model.parameters(), lr=0.01)
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches_of(case: StageCase, step: int) -> list[list[Batch]]:
    """The micro-batches of a step, by the text they are of."""
    g = torch.Generator().manual_seed(50 + step)
    return [[_batch(case, text, number, g) for number in range(case.accumulate)] for text in range(case.texts)]


def _batch(case: StageCase, text: int, number: int, g: torch.Generator) -> Batch:
    tokens_BS = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=g)
    is_idle = case.idle_rank and text == case.texts - 1
    padding_B = torch.full((SEQUENCES,), LENGTH) if is_idle else torch.tensor([0, (text + number) % 4])
    mask_BS = torch.arange(LENGTH) < (LENGTH - padding_B).unsqueeze(1)
    targets_BS = tokens_BS[:, 1:].masked_fill(~mask_BS, -100)
    return Batch(tokens_BS=tokens_BS[:, :-1].contiguous(), targets_BS=targets_BS, mask_BS=mask_BS)


def in_one_process(case: StageCase) -> StageCase:
    """Ranks are micro-batches there, so what is counted over ranks is counted over micro-batches."""
    wide = tuple(
        replace(loss, scope="global") if getattr(loss, "scope", "") == "data_parallel" else loss for loss in case.losses
    )
    return replace(case, losses=wide)


def by_ranks(cases: Sequence[StageCase]) -> dict[int, list[StageCase]]:
    """Most first."""
    sizes = sorted({case.ranks for case in cases}, reverse=True)
    return {size: [case for case in cases if case.ranks == size] for size in sizes}
