"""`turnout bench train-ranks`: what it refuses, and a round of every peer that is installed."""

from importlib.util import find_spec

import pytest

from turnout.bench import train_ranks
from turnout.errors import ConfigError
from turnout.train.recipes import load_recipe

SMALL = ["model.dim=16", "model.num_layers=1", "loop.batch_size=2", "loop.seq_len=16"]
OURS = (train_ranks.OURS, train_ranks.LIKE)


@pytest.mark.parametrize(
    ("recipe", "ranks", "peers", "settings", "words"),
    [
        ("tiny", 2, ("megablocks",), (), "unknown peer 'megablocks'; available: turnout"),
        ("tiny", 1, OURS, (), "at least 2"),
        ("tiny-dense", 2, OURS, (), "has no experts"),
        ("tiny", 3, OURS, (), "3"),
        ("smoke", 2, ("deepspeed",), ("model.moe.bias=true",), "model.moe.bias is True, DeepSpeed's False"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    ranks: int,
    peers: tuple[str, ...],
    settings: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(train_ranks, "start_ranks", lambda *_: pytest.fail("a rank was started"))
    monkeypatch.setattr(train_ranks, "check_deepspeed", lambda: None)
    with pytest.raises(ConfigError, match=words):
        train_ranks.run(load_recipe(recipe, settings), ranks, peers=peers, rounds=1, warmup=0)


@pytest.mark.slow
def test_ranks_take_turns_and_a_step_is_that_of_the_slowest() -> None:
    peers = train_ranks.PEERS if find_spec("deepspeed") else OURS
    result = train_ranks.run(load_recipe("tiny", SMALL), 2, peers=peers, rounds=2, warmup=1)
    rows = {row["peer"]: row for row in result["rows"]}
    assert list(rows) == list(peers)
    assert rows["turnout"]["speedup_of_turnout"] == 1.0
    assert all(row["ms_min"] > 0 and row["ranks"] == 2 for row in rows.values())
    assert rows["turnout"]["routing"] == "hash(k=1) + no loss"
    assert train_ranks._slowest([[1.0, 5.0], [2.0, 4.0]]).ms == (2.0, 5.0)
