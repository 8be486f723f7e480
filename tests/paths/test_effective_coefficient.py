"""A coefficient means the same however a step is split into micro-batches and ranks, and wherever it is padded.

The router's gradient is taken with the main loss zeroed; the most repeated bug of the field is that it changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from turnout.contracts import Loss
from turnout.data.sampler import Batch
from turnout.layers.attention import AttentionConfig
from turnout.layers.moe import MoEConfig
from turnout.losses import (
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    Importance,
    LoadBalance,
    LoadCV,
    Locality,
    RouterZ,
)
from turnout.models import Decoder, ModelConfig
from turnout.models.decoder import DecoderLoss
from turnout.routers import DeepSeekV3, ReMoE, TopK
from turnout.routers.deepseek_v3 import DeepSeekV3Router
from turnout.routers.remoe import ReMoERouter
from turnout.train.device import autocast_for
from turnout.train.step import StepResult, train_step

NUM_SEQUENCES, LENGTH, VOCAB = 8, 12, 50
# ranks, and most padding of a sequence, as a share
WORLDS = [(2, 0.0), (2, 0.5), (2, 1.0), (4, 0.0), (4, 0.5), (4, 1.0)]
MEANS_OVER_TOKENS: list[Loss | ReMoE] = [
    LoadBalance(coefficient=0.3, scope="global"),
    LoadBalance(coefficient=0.3, scope="sequence"),
    RouterZ(coefficient=0.3),
    Entropy(coefficient=0.3),
    ReMoE(k=2, balanced=False, init_std=0.5),
]
OF_A_MICRO_BATCH: list[Loss | ReMoE] = [
    LoadBalance(coefficient=0.3),
    LoadBalance(coefficient=0.3, count="first"),
    Importance(coefficient=0.3),
    Importance(coefficient=0.3, of="weights"),
    LoadCV(coefficient=0.3),
    DeviceBalance(coefficient=0.3, groups=3),
    CommunicationBalance(coefficient=0.3, groups=3, top_groups=2),
    Locality(coefficient=0.3, local=(0, 3)),
    ReMoE(k=2, init_std=0.5),
]
GROWTHS = 90  # steps of a ReMoE router that has learned for a while: its strength is 0.13


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What one step would have done."""

    by_name: dict[str, Tensor]
    result: StepResult


def small_model(*losses: Loss, router: Any = None) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            vocab_size=VOCAB,
            dim=16,
            num_layers=2,
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
            moe=MoEConfig(num_experts=6, hidden=8, router=router or TopK(k=2, init_std=0.5), losses=losses),
        )
    ).double()


def model_with(part: Loss | ReMoE) -> Decoder:
    """A model that this loss trains, or the router's own."""
    if isinstance(part, Loss):
        noisy = TopK(k=2, init_std=0.5, gate_noise=1.0) if isinstance(part, LoadCV) else None
        return small_model(part, router=noisy)
    model = small_model(router=part)
    for _, layer in model.moe_blocks():
        assert isinstance(layer.router, ReMoERouter)
        layer.router.growths.fill_(GROWTHS)
    return model


def name_of(part: Loss | ReMoE) -> str:
    return "-".join(
        [type(part).__name__, *(str(getattr(part, n)) for n in ("scope", "count", "of") if hasattr(part, n))]
    )


def text(most_padding: float) -> Batch:
    """Sequences of which up to a share is padding at the end."""
    g = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(VOCAB, (NUM_SEQUENCES, LENGTH + 1), generator=g)
    padding_B = torch.linspace(0, most_padding * LENGTH, NUM_SEQUENCES).round().long()
    mask_BS = torch.arange(LENGTH) < (LENGTH - padding_B).unsqueeze(1)
    targets_BS = tokens_BS[:, 1:].masked_fill(~mask_BS, -100)
    return Batch(
        tokens_BS=tokens_BS[:, :-1].contiguous(), targets_BS=targets_BS, mask_BS=mask_BS if most_padding else None
    )


def split(batch: Batch, num_parts: int) -> list[Batch]:
    masks = [None] * num_parts if batch.mask_BS is None else batch.mask_BS.chunk(num_parts)
    chunks = zip(batch.tokens_BS.chunk(num_parts), batch.targets_BS.chunk(num_parts), masks, strict=True)
    return [Batch(tokens_BS=tokens, targets_BS=targets, mask_BS=mask) for tokens, targets, mask in chunks]


def gradients(model: Decoder, batches: Sequence[Batch], *, main: float = 0.0, same_noise: bool = False) -> Gradients:
    """The gradients of one step, averaged over ranks, its main loss multiplied by `main`.

    same_noise: a noisy router draws alike in every micro-batch.
    """

    def loss(*args: Any, **kwargs: Any) -> DecoderLoss:
        if same_noise:
            torch.manual_seed(0)
        result = model.loss(*args, **kwargs)
        return replace(result, main=main * result.main)

    kept: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            if dist.is_initialized():
                dist.all_reduce(grad)
                grad /= dist.get_world_size()
            kept[name] = grad

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(keep)
    autocast = autocast_for(torch.device("cpu"), torch.float32)
    result = train_step(model, loss, optimizer, batches, max_norm=math.inf, autocast=autocast)
    assert result.problem is None
    return Gradients(by_name=kept, result=result)


def assert_same(got: Gradients, want: Gradients) -> None:
    routers = {name: grad for name, grad in want.by_name.items() if "router" in name}
    assert routers
    assert all(float(grad.abs().max()) > 1e-5 for grad in routers.values())
    for name, grad in want.by_name.items():
        torch.testing.assert_close(got.by_name[name], grad, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("most_padding", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize("part", MEANS_OVER_TOKENS, ids=name_of)
def test_micro_batches_and_padding_do_not_change_it(part: Loss | ReMoE, num_parts: int, most_padding: float) -> None:
    batch = text(most_padding)
    want = gradients(model_with(part), [batch])
    got = gradients(model_with(part), split(batch, num_parts))
    assert_same(got, want)
    assert got.result.aux == pytest.approx(want.result.aux, rel=1e-9)
    assert got.result.total_loss == pytest.approx(want.result.total_loss, rel=1e-9)


@pytest.mark.parametrize("part", OF_A_MICRO_BATCH, ids=name_of)
def test_losses_of_a_micro_batch_weigh_what_its_tokens_weigh(part: Loss | ReMoE) -> None:
    """Where micro-batches are alike the coefficient is the same however many there are."""
    batch = text(0.5)
    want = gradients(model_with(part), [batch], same_noise=True)
    got = gradients(model_with(part), [batch] * 4, same_noise=True)
    assert_same(got, want)
    assert got.result.aux == pytest.approx(want.result.aux, rel=1e-9)


@pytest.mark.parametrize("most_padding", [0.0, 0.5])
@pytest.mark.parametrize("part", OF_A_MICRO_BATCH, ids=name_of)
def test_where_micro_batches_differ_their_losses_are_another_mean_as_the_docs_say(
    part: Loss | ReMoE, most_padding: float
) -> None:
    """Each counts its own tokens alone; the coefficient stands as written, weighed by the share of the tokens."""
    batch = text(most_padding)
    batches = split(batch, 4)
    whole, got = (gradients(model_with(part), parts, same_noise=True) for parts in ([batch], batches))
    shares = [num_tokens(part_of) / num_tokens(batch) for part_of in batches]
    alone = [gradients(model_with(part), [part_of], same_noise=True) for part_of in batches]
    for name, grad in got.by_name.items():
        want = sum(share * one.by_name[name] for share, one in zip(shares, alone, strict=True))
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-13, msg=name)
    mean = sum(share * one.result.total_loss for share, one in zip(shares, alone, strict=True))
    assert got.result.total_loss == pytest.approx(mean, rel=1e-9)
    assert abs(mean / whole.result.total_loss - 1) > 1e-4
    routers = [name for name in whole.by_name if "router" in name]
    assert all(float((got.by_name[n] - whole.by_name[n]).abs().max()) > 1e-5 for n in routers)


def test_the_main_loss_too_is_a_mean_over_the_steps_tokens() -> None:
    batch = text(1.0)
    want, got = (gradients(small_model(RouterZ()), split(batch, parts), main=1.0) for parts in (1, 4))
    assert_same(got, want)
    assert got.result.loss == pytest.approx(want.result.loss, rel=1e-12)


def test_padding_alone_changes_nothing() -> None:
    """Half as many tokens again, all of them padding, in sequences of their own."""
    batch, loss = text(0.5), LoadBalance(scope="global")
    assert batch.mask_BS is not None
    padding = Batch(
        tokens_BS=batch.tokens_BS[:4],
        targets_BS=torch.full_like(batch.targets_BS[:4], -100),
        mask_BS=torch.zeros_like(batch.mask_BS[:4]),
    )
    assert_same(gradients(small_model(loss), [*split(batch, 2), padding]), gradients(small_model(loss), [batch]))


def test_counting_ahead_draws_what_training_draws() -> None:
    """With a noisy router the counts are those of the choices that are trained on."""
    model = small_model(LoadBalance(scope="global"), router=TopK(k=2, gate_noise=1.0))
    seen: list[Tensor] = []
    for _, layer in model.moe_blocks():
        layer.register_forward_hook(lambda _, __, out: seen.append(out.stats.assigned_E))
    result = gradients(model, split(text(0.5), 2)).result
    ahead, trained = seen[:4], seen[4:]
    assert all(torch.equal(a, b) for a, b in zip(ahead, trained, strict=True))
    assert torch.equal(result.stats[0].assigned_E, trained[0] + trained[2])


def num_tokens(batch: Batch) -> int:
    return batch.tokens_BS.numel() if batch.mask_BS is None else int(batch.mask_BS.sum())


def one_process(rank: int, folder: str) -> None:
    """Four processes: two of them, then all, take steps together."""
    torch.set_num_threads(1)
    for world_size, most_padding in WORLDS:
        if rank < world_size:
            one_rank(rank, world_size, folder, most_padding)


def one_rank(rank: int, world_size: int, folder: str, most_padding: float) -> None:
    """One rank of a data-parallel step of two micro-batches each; rank 0 writes down what came out."""
    store = f"file://{folder}/store-{world_size}-{most_padding}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    mine = split(text(most_padding), 2 * world_size)[2 * rank : 2 * rank + 2]
    outcome = {}
    for part in MEANS_OVER_TOKENS:
        outcome[name_of(part)] = gradients(model_with(part), mine).by_name
    wide = LoadBalance(coefficient=0.3, scope="data_parallel")
    outcome[name_of(wide)] = gradients(model_with(wide), [joined(mine)]).by_name
    learner = small_model(router=DeepSeekV3(k=2))
    gradients(learner, mine, main=1.0)
    outcome["bias"] = {"bias": bias_of(learner)}
    if rank == 0:
        torch.save(outcome, f"{folder}/outcome-{world_size}-{most_padding}.pt")
    dist.destroy_process_group()


def joined(batches: Sequence[Batch]) -> Batch:
    masks = [batch.mask_BS for batch in batches if batch.mask_BS is not None]
    return Batch(
        tokens_BS=torch.cat([batch.tokens_BS for batch in batches]),
        targets_BS=torch.cat([batch.targets_BS for batch in batches]),
        mask_BS=torch.cat(masks) if masks else None,
    )


def bias_of(model: Decoder) -> Tensor:
    _, layer = model.moe_blocks()[0]
    assert isinstance(layer.router, DeepSeekV3Router)
    return layer.router.bias_E.clone()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, float], Any]:
    folder = tmp_path_factory.mktemp("ranks")
    # forked: to import torch again would take each of them longer than its steps
    most = max(world_size for world_size, _ in WORLDS)
    multiprocessing.start_processes(one_process, args=(str(folder),), nprocs=most, start_method="fork")
    return {(size, padding): torch.load(folder / f"outcome-{size}-{padding}.pt") for size, padding in WORLDS}


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_ranks_and_padding_do_not_change_it(world: tuple[int, float], outcomes: dict[tuple[int, float], Any]) -> None:
    outcome, batch = outcomes[world], text(world[1])
    whole = LoadBalance(coefficient=0.3, scope="global")
    pairs = [(part, part) for part in MEANS_OVER_TOKENS]
    for part, same in [*pairs, (replace(whole, scope="data_parallel"), whole)]:
        want = gradients(model_with(same), [batch])
        assert_same(Gradients(by_name=outcome[name_of(part)], result=want.result), want)
    learner = small_model(router=DeepSeekV3(k=2))
    gradients(learner, [batch], main=1.0)
    assert torch.equal(outcome["bias"]["bias"], bias_of(learner))
    assert float(bias_of(learner).abs().max()) > 0
