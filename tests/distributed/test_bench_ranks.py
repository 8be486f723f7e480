"""`turnout bench train-ranks` and `copies`: what they refuse, and a round of everybody who is there."""

from importlib.util import find_spec

import pytest

from turnout.bench import copies, train_ranks
from turnout.bench.copies import CopiesCase
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


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CopiesCase(ranks=4, experts=3), "--ranks 4 must be from 2 to --experts 3"),
        (lambda: CopiesCase(ranks=2, experts=4, copies=(5,)), "expert_copies=5 must not exceed 4"),
    ],
)
def test_copies_that_cannot_be_are_refused(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.slow
def test_copies_relieve_the_fullest_rank_and_their_gradients_are_counted() -> None:
    case = CopiesCase(ranks=2, tokens=64, dim=16, hidden=8, experts=4, k=1, skew=3.0, copies=(2,))
    result = copies.run(case, rounds=2, warmup=1)
    rows = {(row["mode"], row["peer"]): row for row in result["rows"]}
    assert len(rows) == 6
    for mode in copies.MODES:
        loads = [rows[mode, name]["max_load"] for name in (copies.IN_ORDER, copies.SEARCHED, "2 copies")]
        # of 64 tokens 54 want the first expert
        assert loads[0] > loads[1] > 1.6
        assert loads[2] < 1.1
    assert rows["forward", "2 copies"]["copy_bytes"] == 0
    # two experts on both ranks: each sends one and gets one, there and back
    assert rows["train", "2 copies"]["copy_bytes"] == 2 * 2 * 4 * 3 * 16 * 8
    assert rows["train", "2 copies"]["weight_bytes"] == 3 * 4 * 3 * 16 * 8
