"""Of several ranks that are not there, the one that holds up the others is named first."""

import time
from dataclasses import asdict
from typing import Any

from turnout.comm import Ledger, Watch, World
from turnout.comm.ledger import Whereabouts

EVERY_S = 2.0


def told(collective: str, number: int, *, is_inside: bool, ago_s: float = 0.0) -> dict[str, Any]:
    where = Whereabouts(step=5, collective=collective, is_inside=is_inside, number=number)
    return {**asdict(where), "told_s": time.time() - ago_s}


def said_by_rank_9(seen: dict[int, dict[str, Any]], heard_s_ago: float = 0.0) -> list[str]:
    watch = Watch(World(rank=9, size=12, local_size=12), Ledger(), print, every_s=EVERY_S)
    watch._seen, watch._heard_s = seen, time.time() - heard_s_ago
    words = watch._words(Whereabouts(step=5, collective="sum of gradients", is_inside=True, number=9), 21.0)
    place, _, absent = words.partition(": ")
    assert place == "rank 9 has waited 21 s in step 5, in the sum of gradients"
    return absent.split("; ")


def test_who_is_silent_comes_before_who_computes_and_that_before_who_waits_itself() -> None:
    waiting = told("all-gather of counts", 7, is_inside=True)
    seen = {
        1: waiting,
        2: told("all-gather of counts", 7, is_inside=False),
        3: told("sum of gradients", 9, is_inside=True),
        4: waiting,
        10: told("all-gather of counts", 7, is_inside=True, ago_s=30),
    }
    assert said_by_rank_9(seen) == [
        "rank 10 has told nothing for 30 s, last in step 5, in the all-gather of counts",
        "rank 2 is not there yet: it is in step 5, after the all-gather of counts",
        "rank 1 waits elsewhere, in step 5, in the all-gather of counts",
        "rank 4 waits elsewhere, in step 5, in the all-gather of counts",
    ]


def test_where_all_are_there_it_is_the_network() -> None:
    there = {rank: told("sum of gradients", 9, is_inside=True) for rank in (1, 2)}
    assert said_by_rank_9(there) == ["every rank is there: the network between them is not"]


def test_where_the_keeper_of_what_is_told_is_silent_nobody_else_is_blamed() -> None:
    old = {rank: told("sum of gradients", 8, is_inside=False, ago_s=19) for rank in (0, 1)}
    assert said_by_rank_9(old, heard_s_ago=19) == ["rank 0, which keeps what the ranks tell, has not answered for 19 s"]
