"""The sampler: every token once an epoch, one global order, and a resumed run equal to an unbroken one."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.data.sampler import Sampler, validation_batches
from turnout.data.shards import FORMAT, ShardIndex, TokenShard, write_shard
from turnout.errors import CheckpointError, ConfigError, DataError

sizes = st.integers(1, 5)


def shard_of(num_tokens: int, name: str = "s") -> TokenShard:
    """A shard whose tokens are 0, 1, 2, ..., so that a token tells its place."""
    index = ShardIndex(
        format=FORMAT,
        dtype="uint32",
        num_tokens=num_tokens,
        vocab_size=num_tokens,
        eot_id=0,
        tokenizer="t",
        corpus="c",
        sha256=name * 64,
    )
    return TokenShard(index, np.array([0, num_tokens]), np.arange(num_tokens, dtype=np.uint32))


def epoch_targets(sampler: Sampler) -> list[int]:
    return [int(t) for _ in range(sampler.batches_per_epoch) for t in sampler.next_batch().targets_BS.flatten()]


@settings(max_examples=50)
@given(batch_size=sizes, seq_len=sizes, extra=st.integers(0, 60), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_visits_each_token_once_but_for_what_fills_no_batch(
    batch_size: int, seq_len: int, extra: int, seed: int
) -> None:
    num_tokens = batch_size * seq_len + 1 + extra
    sampler = Sampler(shard_of(num_tokens), batch_size, seq_len, seed)
    for _ in range(2):
        seen = Counter(epoch_targets(sampler))
        assert set(seen.values()) <= {1}
        assert set(seen) <= set(range(1, num_tokens))
        assert len(seen) == sampler.batches_per_epoch * batch_size * seq_len
        assert len(seen) > num_tokens - 1 - (batch_size + 1) * seq_len


@given(batch_size=sizes, seq_len=sizes, extra=st.integers(0, 30))
def test_targets_are_the_tokens_one_later(batch_size: int, seq_len: int, extra: int) -> None:
    batch = Sampler(shard_of(batch_size * seq_len + 1 + extra), batch_size, seq_len).next_batch()
    assert batch.tokens_BS.shape == batch.targets_BS.shape == (batch_size, seq_len)
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64
    assert torch.equal(batch.tokens_BS + 1, batch.targets_BS)


@settings(max_examples=50)
@given(batch_size=sizes, seq_len=sizes, extra=st.integers(0, 40), before=st.integers(0, 25), seed=st.integers(0, 9))
def test_a_run_resumed_at_any_step_sees_what_an_unbroken_one_sees(
    batch_size: int, seq_len: int, extra: int, before: int, seed: int
) -> None:
    shard = shard_of(batch_size * seq_len + 1 + extra)
    unbroken, resumed = (Sampler(shard, batch_size, seq_len, seed) for _ in range(2))
    for _ in range(before):
        unbroken.next_batch()
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    assert resumed.state_dict() == unbroken.state_dict()
    for _ in range(2 * unbroken.batches_per_epoch + 1):
        assert torch.equal(unbroken.next_batch().tokens_BS, resumed.next_batch().tokens_BS)


@settings(max_examples=50)
@given(batch_size=sizes, world_size=sizes, seq_len=sizes, extra=st.integers(0, 60), before=st.integers(0, 5))
def test_ranks_share_each_step_of_the_one_global_order(
    batch_size: int, world_size: int, seq_len: int, extra: int, before: int
) -> None:
    shard = shard_of(batch_size * world_size * seq_len + 1 + extra)
    alone = Sampler(shard, batch_size * world_size, seq_len, seed=3)
    for _ in range(before):
        alone.next_batch()
    ranks = [Sampler(shard, batch_size, seq_len, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    for sampler in ranks:
        sampler.load_state_dict(alone.state_dict())
    for _ in range(alone.batches_per_epoch + 1):
        shares = [sampler.next_batch().tokens_BS for sampler in ranks]
        # rank r has rows r, r + P, ... of the global batch
        together = torch.stack(shares, dim=1).flatten(0, 1)
        assert torch.equal(together, alone.next_batch().tokens_BS)


def test_the_order_of_a_seed_and_epoch_never_changes() -> None:
    sampler = Sampler(shard_of(9), 1, 1, seed=7)
    assert [epoch_targets(sampler) for _ in range(2)] == [[2, 8, 6, 7, 5, 4, 3, 1], [7, 8, 3, 4, 6, 1, 2, 5]]


def test_seeds_and_epochs_give_other_orders() -> None:
    first, second = (Sampler(shard_of(100), 1, 1, seed) for seed in (1, 2))
    orders = [epoch_targets(sampler) for sampler in (first, second, first)]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "saved with seed=1, here it is 0"),
        ({"global_batch_size": 8}, "saved with global_batch_size=8, here it is 2"),
        ({"seq_len": None}, "saved with seq_len=None, here it is 3"),
        ({"shard": "x"}, "saved with shard='x', here it is 'ssss"),
        ({"epoch": -1}, "damaged: epoch=-1"),
        ({"position": 10**6}, "damaged: epoch=0, position=1000000"),
        ({"position": 1}, "position=1 is inside a batch"),
        ({"position": "2"}, "damaged: epoch=0, position='2'"),
    ],
)
def test_the_state_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    sampler = Sampler(shard_of(100), 2, 3)
    with pytest.raises(CheckpointError, match=message):
        sampler.load_state_dict(sampler.state_dict() | change)


def test_sizes_that_cannot_be_are_refused() -> None:
    shard = shard_of(10)
    for arguments in ({"batch_size": 0, "seq_len": 1}, {"batch_size": 1, "seq_len": 0}):
        with pytest.raises(ConfigError, match=r"batch_size=\d and seq_len=\d must be at least 1"):
            Sampler(shard, **arguments)
    with pytest.raises(ConfigError, match="rank=2 must be at least 0 and below world_size=2"):
        Sampler(shard, 1, 1, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="seed=-1 must be"):
        Sampler(shard, 1, 1, seed=-1)
    with pytest.raises(DataError, match="10 tokens; one window of seq_len=10 needs 11"):
        Sampler(shard, 1, 10)
    with pytest.raises(DataError, match=r"10 tokens make 3 windows of seq_len=3: too few for one batch of 4 .*2 ranks"):
        Sampler(shard, 2, 3, world_size=2)
    with pytest.raises(ConfigError, match="max_tokens=3 must be at least one window of seq_len=4"):
        validation_batches(shard, 1, 4, max_tokens=3)


@given(num_tokens=st.integers(6, 80), batch_size=sizes, seq_len=sizes, max_tokens=st.integers(5, 90))
def test_validation_is_the_head_of_the_text_whatever_the_batch(
    num_tokens: int, batch_size: int, seq_len: int, max_tokens: int
) -> None:
    batches = list(validation_batches(shard_of(num_tokens), batch_size, seq_len, max_tokens))
    targets = torch.cat([batch.targets_BS.flatten() for batch in batches]).tolist()
    num_windows = min(num_tokens - 1, max_tokens) // seq_len
    assert targets == list(range(1, num_windows * seq_len + 1))
    assert all(len(batch.tokens_BS) == batch_size for batch in batches[:-1])


def test_a_mapped_shard_feeds_the_sampler(tmp_path: Path) -> None:
    with write_shard(tmp_path / "train.bin", vocab_size=300, eot_id=0, tokenizer="t", corpus="c") as writer:
        writer.append(list(range(1, 41)))
    batch = Sampler(TokenShard.open(tmp_path / "train.bin"), 2, 4).next_batch()
    assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])
