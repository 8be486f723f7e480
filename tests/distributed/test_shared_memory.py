"""Ranks of one host through memory they share: what gloo would have brought, bit for bit, and no faults of its own."""

import gc
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.cases import EMPTY, PROGRAMS, LayerCase
from tests.distributed.ranks import _groups, run_layer, run_random, spawn
from turnout.comm import World, lines, mailboxes, shared_memory
from turnout.comm.lines import SETTING, Wanted, open_lines, shared_line
from turnout.comm.shared_memory import SharedLine
from turnout.dispatch import FixedCapacity
from turnout.errors import ConfigError

CALLS = 60
LATE_S = 3.0
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)
HERE = pytest.mark.skipif(bool(shared_memory.why_not()), reason=shared_memory.why_not())


def cases() -> list[LayerCase]:
    """Every program on two hosts of two, and what programs do not do alike."""
    plain = LayerCase(local=2)
    found = [replace(plain, program=program) for program in PROGRAMS]
    found += [replace(plain, program="node_dedup", tokens=EMPTY), replace(plain, crowded=True)]
    found += [replace(plain, tokens=(0, 0, 0, 0)), replace(plain, dtype=torch.float32, program="hierarchical")]
    return [*found, replace(plain, capacity=FixedCapacity(factor=1.0), backend="padded_bmm")]


def work(world: World, folder: Path) -> None:
    """Layers over gloo and through memory; single calls; then a rank that ends."""
    outcomes: dict[str, Any] = {}
    for wanted in ("0", "1"):
        os.environ[SETTING] = wanted
        _groups.cache_clear()
        outcomes[wanted] = [run_layer(case, replace(world, local_size=case.local)) for case in cases()]
    outcomes["random"] = run_random(world, 40)
    line = shared_line(dist.group.WORLD, timeout_s=30)
    assert line is not None
    outcomes["differ"] = differing_calls(line, world)
    outcomes["sums"] = differing_sums(line, world)
    outcomes["refused"] = {flaw: refused(world, flaw) for flaw in FLAWS}
    outcomes["unequal"] = {name: unequal(world, wants) for name, wants in UNEQUAL.items()}
    outcomes["elsewhere"] = refused_elsewhere(world)
    outcomes["kept"] = kept(line, world)
    outcomes["segments"] = len(os.listdir("/proc/self/fd"))
    for _ in range(CALLS):
        one_call(line, world, torch.zeros(world.size, 50_000))
    outcomes["segments_after"] = len(os.listdir("/proc/self/fd"))
    torch.save(outcomes, folder / f"rank-{world.rank}.pt")
    few = dist.new_group([1, 2, 3])
    line_of_few = None if world.rank == 0 else shared_line(few, timeout_s=30)
    dist.barrier()
    if world.rank == 1:
        os._exit(0)
    said = said_of_the_dead(line, world)
    if line_of_few is not None:
        # the other comes late: one that waits for it is to say who will never come
        time.sleep(LATE_S if world.rank == 3 else 0)
        said += "\n" + said_of_the_dead(line_of_few, world)
    (folder / f"said-{world.rank}").write_text(said, encoding="utf-8")
    # not again through a group with a rank less
    os._exit(0)


def one_call(line: SharedLine, world: World, tensor: Tensor) -> Tensor:
    each = [len(tensor) // line.size] * line.size
    return line.all_to_all(tensor, each, each)


def differing_calls(line: SharedLine, world: World) -> list[int]:
    """Calls in which memory brought something else than gloo; sizes are uneven and often zero."""
    wrong = []
    for call in range(CALLS):
        draw = random.Random(call)
        sent = [[draw.choice((0, 0, 1, 3, 700)) for _ in range(world.size)] for _ in range(world.size)]
        dtype, width = draw.choice(DTYPES), draw.choice((1, 5, 33))
        mine, theirs = sent[world.rank], [row[world.rank] for row in sent]
        tensor = (torch.arange(sum(mine) * width) + 1000 * world.rank).to(dtype).view(sum(mine), width)
        got, want = line.all_to_all(tensor, theirs, mine), tensor.new_empty(sum(theirs), width)
        dist.all_to_all_single(want, tensor, theirs, mine)
        if got.dtype != dtype or not torch.equal(got, want):
            wrong.append(call)
    return wrong


def differing_sums(line: SharedLine, world: World) -> list[str]:
    """Sums and gathers in which memory brought something else than gloo, or other bits than on the first rank."""
    wrong = []
    for number in (0, 1, 3, 4, 5, 1000, 8192, 8193, 50_001):
        for dtype in (torch.float32, torch.float64, torch.int64, torch.int32):
            tensor = (torch.arange(number) % 17 - 5).to(dtype) * (world.rank + 1) / 3
            tensor = tensor.to(dtype)
            got, want, every = line.all_reduce(tensor), tensor.clone(), list(tensor.new_empty(world.size, number))
            dist.all_reduce(want)
            dist.all_gather(every, tensor)
            first = got.clone()
            dist.broadcast(first, src=0)
            same = torch.allclose(got, want, rtol=1e-6, atol=0) and torch.equal(got, first)
            if not (same and got.dtype == dtype and torch.equal(line.all_gather(tensor), torch.cat(every))):
                wrong.append(f"{number} of {dtype}")
    return wrong


def refused(world: World, flaw: str) -> tuple[str, str, int]:
    """What is said where one rank has that flaw: if memory is wanted always, else; and how many groups share then."""
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            FLAWS[flaw](patch)
        said = ""
        try:
            open_lines([dist.group.WORLD], world, timeout_s=30, want="always", cuda=False)
        except ConfigError as error:
            said = str(error)
        found = open_lines([dist.group.WORLD], world, timeout_s=30, want="if proven", cuda=False)
    return said, found.reason, len(found.of_group)


def refused_elsewhere(world: World) -> str:
    """What is said on every rank where one group of two has a rank that cannot share, and memory is wanted always."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 3:
            _no_memory(patch)
        try:
            open_lines([pairs[world.rank // 2]], world, timeout_s=30, want="always", cuda=False)
        except ConfigError as error:
            return str(error)
    return "nothing"


def _no_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lines, "why_not", lambda: "no memory on this one")


def _no_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mailboxes, "mapped", lambda *_: Path("/nowhere/at/all").read_bytes())


def _wrong_rows(patch: pytest.MonkeyPatch) -> None:
    right = SharedLine.all_to_all
    patch.setattr(SharedLine, "all_to_all", lambda self, tensor, *splits: right(self, tensor + 1, *splits))


def _no_call(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "pidfd_open")


def _unreadable_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lines, "host", lambda: Path("/nowhere/to/tell").read_text(encoding="ascii"))


FLAWS = {
    "no memory on this one": _no_memory,
    "FileNotFoundError": _no_file,
    "something else": _wrong_rows,
    "Python has no os.pidfd_open": _no_call,
    "nowhere/to/tell": _unreadable_host,
}
UNEQUAL: dict[str, tuple[Wanted, ...]] = {
    "at odds": ("always", "never", "if proven", "if proven"),
    "one alone does not want it": ("if proven", "if proven", "never", "if proven"),
    "one alone insists": ("if proven", "if proven", "if proven", "always"),
}


def unequal(world: World, wants: Sequence[Wanted]) -> tuple[str, int]:
    """What is said where ranks were told different things, and how many groups then share memory."""
    try:
        found = open_lines([dist.group.WORLD], world, timeout_s=30, want=wants[world.rank], cuda=False)
    except ConfigError as error:
        return str(error), 0
    return found.reason, len(found.of_group)


def kept(line: SharedLine, world: World) -> bool:
    """Whether what was received stays as it was for as long as anything refers to it, be it a view."""
    views = [one_call(line, world, torch.full((world.size, 9), float(number)))[1:] for number in range(20)]
    gc.collect()
    for _ in range(20):
        one_call(line, world, torch.full((world.size, 9), -1.0))
    return all(bool((view == number).all()) for number, view in enumerate(views))


def said_of_the_dead(line: SharedLine, world: World) -> str:
    started = time.monotonic()
    try:
        one_call(line, world, torch.zeros(line.size, 2))
    except RuntimeError as error:
        return f"{error} after {time.monotonic() - started:.0f} s"
    return "nothing"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shared-memory")
    spawn(work, 4, folder)
    of_ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]
    for rank, outcome in enumerate(of_ranks):
        said = folder / f"said-{rank}"
        outcome["said"] = said.read_text(encoding="utf-8") if said.exists() else ""
    return of_ranks


@HERE
@pytest.mark.parametrize("number", range(len(cases())), ids=[case.name for case in cases()])
def test_a_layer_is_the_same_through_memory_bit_for_bit(number: int, outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        by_gloo, by_memory = outcome["0"][number], outcome["1"][number]
        for name in ("y", "x_grad", "losses", "stats"):
            assert torch.equal(by_memory[name], by_gloo[name]), name
        for name, grad in by_gloo["grads"].items():
            assert torch.equal(by_memory["grads"][name], grad), name
        for way in ("forward", "backward"):
            assert by_memory[way] == by_gloo[way]


@HERE
def test_passes_with_any_number_of_tokens_equal_one_rank(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert max(outcome["random"].values()) <= 1e-10


@HERE
def test_any_exchange_brings_what_gloo_brings(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["differ"] for outcome in outcomes] == [[]] * 4


@HERE
def test_memory_is_used_again_only_when_nothing_lies_in_it(outcomes: list[dict[str, Any]]) -> None:
    assert all(outcome["kept"] for outcome in outcomes)
    assert all(outcome["segments_after"] == outcome["segments"] for outcome in outcomes)


@HERE
def test_who_waits_for_a_rank_that_ended_says_which(outcomes: list[dict[str, Any]]) -> None:
    for rank in (0, 2, 3):
        # by its number in the job, be it another in the group; at once, whoever else is waited for
        said = outcomes[rank]["said"].splitlines()
        assert said[0] == "rank 1 has ended after 0 s"
        if rank == 2:
            assert said[1] == said[0]
        if rank == 3:
            # it comes after rank 2 has given up
            assert re.match(r"rank 1 (has|and rank 2 have) ended after 0 s", said[1])


@HERE
def test_memory_that_went_with_its_process_is_no_error_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [mailboxes.mailbox(2) for _ in range(2)]
    cards = [(os.getpid(), box.descriptor) for box in boxes]
    first, second = (SharedLine(box, cards, rank, 30, names=(4, 7)) for rank, box in enumerate(boxes))
    monkeypatch.setattr(mailboxes, "mapped", lambda *_: Path("/proc/1/fd/none").read_bytes())
    said = []

    def call(line: SharedLine) -> None:
        with pytest.raises(RuntimeError, match=r"the memory of rank [47] cannot be reached: ") as raised:
            line.all_to_all(torch.zeros(2, 3), [1, 1], [1, 1])
        said.append(str(raised.value))

    threads = [threading.Thread(target=call, args=(line,)) for line in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(said) == 2


@HERE
def test_no_byte_is_read_that_a_tensor_has_not_or_written_where_none_is_expected() -> None:
    box = mailboxes.mailbox(1)
    line = SharedLine(box, [(os.getpid(), box.descriptor)], 0, 30, names=(5,))
    with pytest.raises(RuntimeError, match="36 bytes are to be sent of a tensor that has 24"):
        line.all_to_all(torch.zeros(2, 3), [3], [3])
    with pytest.raises(RuntimeError, match="rank 5 has 24 bytes for rank 5, which expects 12"):
        line.all_to_all(torch.zeros(2, 3), [1], [2])
    across = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(line.all_to_all(across, [3], [3]), across)
    assert torch.equal(line.all_gather(across), across)


@HERE
@pytest.mark.parametrize("name", UNEQUAL)
def test_ranks_that_were_told_different_things_agree(name: str, outcomes: list[dict[str, Any]]) -> None:
    said = [outcome["unequal"][name] for outcome in outcomes]
    assert said == said[:1] * 4
    words, num_lines = said[0]
    if name == "one alone insists":
        assert said[0] == ("", 1)
    elif name == "at odds":
        assert num_lines == 0
        assert re.match(rf"{SETTING}=1 on rank 0 and {SETTING}=0 on rank 1: .*nearest legal", words)
    else:
        assert said[0] == (f"{SETTING}=0 on rank 2", 0)


@HERE
def test_sums_and_gathers_are_those_of_gloo_and_alike_on_all_ranks(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["sums"] for outcome in outcomes] == [[]] * 4


@HERE
@pytest.mark.parametrize("flaw", FLAWS)
def test_what_one_rank_cannot_no_rank_does(flaw: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        said, reason, num_lines = outcome["refused"][flaw]
        assert re.match(rf"ranks of one host cannot share memory here: rank \d of \[0, 1, 2, 3\]: .*{flaw}", said)
        assert f"nearest legal: {SETTING}=0" in said
        assert (reason, num_lines) == (said, 0)


@HERE
def test_a_group_that_cannot_share_where_it_must_ends_the_whole_job(outcomes: list[dict[str, Any]]) -> None:
    flaw = "rank 3 of [2, 3]: no memory on this one"
    want = f"ranks of one host cannot share memory here: {flaw}; nearest legal: {SETTING}=0"
    assert [outcome["elsewhere"] for outcome in outcomes] == [want] * 4


@pytest.mark.parametrize(("system", "processor"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_where_memory_cannot_be_shared_the_reason_is_said(
    system: str, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory.sys, "platform", system)
    monkeypatch.setattr(shared_memory.platform, "machine", lambda: processor)
    assert {"darwin": "darwin", "linux": "aarch64"}[system] in shared_memory.why_not()


@pytest.mark.parametrize(("value", "want"), [("1", "always"), ("0", "never"), ("", "if proven"), (None, "if proven")])
def test_the_environment_decides(value: str | None, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    if value is not None:
        monkeypatch.setenv(SETTING, value)
    assert lines.wanted() == want
