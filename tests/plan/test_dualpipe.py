"""A pipeline fed from both ends: its program, its idle time against all ranks played out, DeepSeek-V3's parts."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest

from tests.plan.test_time import V3
from turnout.clusters import CLUSTERS
from turnout.plan.dualpipe import FEWEST, ops, program, waits
from turnout.plan.parameters import fitted
from turnout.plan.passes import Pass, stage_pass
from turnout.plan.pipeline import stages
from turnout.plan.terms import One
from turnout.plan.time import step_time
from turnout.plan.wire import Run


def passes(seconds: list[tuple[float, float, float, float]]) -> list[Pass]:
    """Stages from (forward, backward, of it weights, longer when alone)."""
    nothing = dict.fromkeys(
        ("compute_s", "tp_s", "cp_s", "ep_s", "pp_s", "dp_s", "tax_s", "launch_s", "backward_s", "reduced_s"), 0.0
    )
    return [
        Pass(**nothing, total_s=f + b, paired_s=b, weights_s=w, alone_s=alone) for f, b, w, alone in seconds
    ]  # fmt: skip


def words_of(word: str) -> dict[str, str]:
    return dict(zip(word[::2], word[1::2], strict=False))


@pytest.mark.parametrize(("p", "micro_batches"), [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_every_micro_batch_passes_each_stage_once_each_way(p: int, micro_batches: int) -> None:
    for place in range(p // 2):
        counts = Counter(letter + words_of(word)[letter] for word in program(place, p, micro_batches)
                         for letter in words_of(word))  # fmt: skip
        for digit in "01":
            assert counts["F" + digit] == micro_batches // 2
            assert counts["B" + digit] + counts["Z" + digit] == micro_batches // 2
        deferred = counts["Z0"] + counts["Z1"]
        assert program(place, p, micro_batches).count("W") == deferred > 0


def test_a_rank_of_sixteen_pairs_97_passes_of_120() -> None:
    kinds = Counter("".join(sorted(word.translate(str.maketrans("Z", "B", "01")))) for word in program(0, 16, 120))
    assert kinds == {"F": 23, "B": 23, "W": 15, "BF": 97}


def end_of_all_ranks(cut: list[Pass], micro_batches: int, hop_s: float) -> float:
    """All ranks and both directions, event by event; the planner looks at one half and at few micro-batches."""
    p = len(cut)
    todo = [program(min(rank, p - 1 - rank), p, micro_batches)[::-1] for rank in range(p)]
    clock, passed, done = [0.0] * p, [Counter() for _ in range(p)], {}
    owed: dict[int, list[int]] = defaultdict(list)

    def step(rank: int) -> bool:
        """Whether the rank could do its next word."""
        ways = words_of(word) if (word := todo[rank][-1]) != "W" else {}
        start, took, results = clock[rank], 0.0, []
        for letter, digit in ways.items():
            direction = int(digit) ^ (rank >= p // 2)
            stage = p - 1 - rank if direction else rank
            way = "F" if letter == "F" else "B"
            key = (way, direction, stage, passed[rank][way, direction])
            needed = stage - 1 if way == "F" else stage + 1
            if 0 <= needed < p:
                before = (way, direction, needed, key[3])
                if before not in done:
                    return False
                start = max(start, done[before] + hop_s)
            took += cut[stage].total_s - cut[stage].paired_s if way == "F" else cut[stage].paired_s
            took += cut[stage].alone_s if len(ways) == 1 else 0.0
            if letter == "Z":
                took -= cut[stage].weights_s
                owed[rank].append(stage)
            results.append(key)
        took += cut[owed[rank].pop(0)].weights_s if word == "W" else 0.0
        for key in results:
            passed[rank][key[0], key[1]] += 1
            done[key] = start + took
        clock[rank] = start + took
        todo[rank].pop()
        return True

    while any(todo):
        moved = [step(rank) for rank in range(p) if todo[rank]]
        assert any(moved)
    return max(clock)


@pytest.mark.parametrize("ends", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("hop_s", [0.0, 0.004])
def test_idle_time_is_that_of_all_ranks_played_out(ends: float, hop_s: float) -> None:
    p, micro_batches = 8, 40
    cut = passes([(0.05 * f, 0.1 * f, 0.03 * f, 0.01) for f in (ends, *[1.0] * 5, 1.2, ends)])
    waiting = waits(cut, hop_s)
    assert waiting.passes_s(FEWEST * p) == pytest.approx(end_of_all_ranks(cut, FEWEST * p, hop_s))
    # further micro-batches hide their sends, but for what no rank's own work can cover
    played = end_of_all_ranks(cut, micro_batches, hop_s)
    assert waiting.passes_s(micro_batches) == pytest.approx(played, rel=0.02 if hop_s else 1e-9)


def idle_s(cut: list[Pass], hop_s: float = 0.0) -> float:
    return waits(cut, hop_s).idle_s(FEWEST * len(cut))


@pytest.mark.parametrize("p", [4, 8, 16, 32])
def test_stages_that_are_alike_idle_by_the_published_formula(p: int) -> None:
    forward, backward, weights = 0.05, 0.1, 0.03
    idle = idle_s(passes([(forward, backward, weights, 0.0)] * p))
    formula = (p / 2 - 1) * (forward + backward + backward - 3 * weights)
    assert 0.85 * formula <= idle <= formula


def test_unlike_stages_idle_longer() -> None:
    alike = [(0.05, 0.1, 0.03, 0.0)] * 16
    unlike = [(0.02, 0.04, 0.01, 0.0), *alike[1:15], (0.09, 0.18, 0.06, 0.0)]
    assert idle_s(passes(unlike)) > 1.05 * idle_s(passes(alike))
    assert idle_s(passes(alike), 0.01) > idle_s(passes(alike))


def test_uneven_experts_never_make_a_step_shorter() -> None:
    steps = [step_time(replace(V3, skew=1 + i / 20), CLUSTERS["h800"]) for i in range(8)]
    assert all(one.step_s < other.step_s for one, other in pairwise(steps))
    assert all(step.bubble_s > 0 for step in steps)


def test_passes_are_in_an_order_that_can_run() -> None:
    seen = set()
    for op in ops(16):
        if op.forward and op.forward[0] > 0:
            assert (op.forward[0] - 1, op.forward[1]) in seen
        if op.forward:
            seen.add(op.forward)
    assert len(seen) == 16 * 16


# seconds a step of DeepSeek-V3 on 2,048 H800: arXiv:2505.09343, table 4
PUBLISHED = {"F": 1.13, "B": 1.99, "W": 0.48, "BF": 13.95, "idle": 2.06, "opt": 0.29}


def parts_s(skew: float) -> dict[str, float]:
    """Seconds a step of V3's passes on the rank that holds the pipeline's ends: no other has so many weights apart."""
    job = replace(V3, skew=skew)
    of = One(Run(job=job, cluster=CLUSTERS["h800"], parameters=fitted()))
    cut = stages(V3.shape, 16)
    held = [stage_pass(of, cut[0]), stage_pass(of, cut[15])]
    parts, owed = dict.fromkeys(PUBLISHED, 0.0), []
    for word in program(0, 16, V3.micro_batches):
        if word == "W":
            parts["W"] += owed.pop(0).weights_s
            continue
        ways = words_of(word)
        kind = "BF" if len(ways) == 2 else "F" if "F" in ways else "B"
        for letter, digit in ways.items():
            stage = held[int(digit)]
            parts[kind] += stage.total_s - stage.paired_s if letter == "F" else stage.paired_s
            parts[kind] += stage.alone_s if len(ways) == 1 else 0.0
            if letter == "Z":
                parts["B"] -= stage.weights_s
                owed.append(stage)
    step = step_time(job, CLUSTERS["h800"])
    after = step.dp_s + step.optimizer_s
    return parts | {"idle": step.step_s - after - sum(parts.values()), "opt": after}


@pytest.mark.parametrize("skew", [1.0, 1.2])
def test_deepseek_v3s_passes_take_what_is_published_each(skew: float) -> None:
    parts = parts_s(skew)
    for kind in ("F", "B", "W", "BF"):
        assert parts[kind] == pytest.approx(PUBLISHED[kind], rel=0.15), kind


def test_uneven_routing_is_what_idle_time_lacks() -> None:
    """With even routing 1.3 of 2.06 s: not within 15 %. Uneven as real routing is, the inner ranks are waited for.

    Runs with forced and with learned routing differ by 1.08 to 1.25; of this run it is not published.
    """
    assert parts_s(1.0)["idle"] < 0.7 * PUBLISHED["idle"]
    assert parts_s(1.2)["idle"] == pytest.approx(PUBLISHED["idle"], rel=0.15)
    assert sum(parts_s(1.2).values()) == pytest.approx(19.93, rel=0.1)


def test_blocks_that_predict_further_tokens_are_cut_as_published() -> None:
    # NVIDIA-NeMo/Megatron-Bridge, recipes/deepseek/deepseek_v3.py: layout_map
    sizes = {pp: [len(stage.layers) for stage in stages(V3.shape, pp)] for pp in (4, 8, 16, 32)}
    assert sizes[4] == [16, 16, 16, 13]
    assert sizes[8] == [8] * 7 + [5]
    assert sizes[16] == [4] * 15 + [1]
    # scripts/performance: "Et|(tt|)*30mL"
    assert sizes[32] == [1, *[2] * 30, 0]
    for pp in (2, 6, 12, 24, 61):
        assert sum(len(stage.layers) for stage in stages(V3.shape, pp)) == 61
    plain = replace(V3.shape, mtp_layers=0)
    assert mean(len(stage.layers) for stage in stages(plain, 16)) == 61 / 16
    assert min(len(stage.layers) for stage in stages(plain, 16)) == 3
