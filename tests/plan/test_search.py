"""The search: arrays say what the scalar planner says, all that is legal is listed, the best is the best."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.columns import Layouts
from turnout.plan.evaluation import base_job, memory_of, step_of_each
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.listing import exchange_choices, list_layouts, with_exchanges
from turnout.plan.memory import memory
from turnout.plan.model import ModelShape
from turnout.plan.parameters import fitted
from turnout.plan.query import Query
from turnout.plan.rank import TIE
from turnout.plan.search import search, undominated
from turnout.plan.shapes import SHAPES
from turnout.plan.space import Legal, Space, as_listed, divisors, powers
from turnout.plan.time import step_time
from turnout.plan.why_not import why_not
from turnout.strategy import Strategy

PYRAMID = replace(
    SHAPES["mixtral-8x7b"], num_layers=8, dense_first=2, ffn_hidden=8192, experts_by_layer=(8, 8, 8, 16, 16, 16)
)
QUERIES = {
    "dense": Query(model="llama3-70b", cluster="dgx-h100", nodes=8, global_batch=256),
    "long": Query(model="llama3-8b", cluster="dgx-h100", nodes=4, global_batch=32, seq_len=32_768),
    "gpt4-moe": Query(model="gpt4-moe", cluster="dgx-a100", nodes=60, global_batch=960, seq_len=8192),
    "mixtral": Query(model="mixtral-8x7b", cluster="dgx-h100", nodes=8, global_batch=256, skew=1.3),
    "uneven": Query(model="mixtral-8x7b", nodes=3, global_batch=96),
    "padded": Query(model="mixtral-8x7b", nodes=8, global_batch=256, capacity_factor=1.25),
    "deepseek-v3": Query(
        model=replace(SHAPES["deepseek-v3"], mtp_layers=1), cluster="h800", nodes=32, global_batch=1024,
        strategy=Strategy(precision="fp8", dispatch_precision="fp8"),
    ),
    "windows": Query(model="gpt-oss-120b", cluster="gb200-nvl72", nodes=2, global_batch=288),
    "encoder-decoder": Query(model="gshard-600b", cluster="tpu-v4", devices=64, global_batch=128, seq_len=1024),
    "pyramid": Query(model=PYRAMID, cluster="dgx-h100", nodes=2, global_batch=64),
    "tied, nanotron": Query(
        model=replace(SHAPES["llama3-8b"], tied_embeddings=True), nodes=4, global_batch=128, framework="nanotron"
    ),
    "torchtitan": Query(model="mixtral-8x7b", nodes=4, global_batch=128, framework="torchtitan"),
    "megatron-2021": Query(model="gpt3-20b", cluster="dgx-a100", nodes=4, global_batch=128, framework="megatron-2021"),
    "half sharded": Query(model="mixtral-8x7b", nodes=8, global_batch=256, strategy=Strategy(zero_size=4)),
}  # fmt: skip


# every path through the formulas, and few of the numbers that only multiply the layouts of each
FEW = Space(micro_batch=(1, 2), virtual_stages=(2,))


def legal_of(query: Query, space: Space | None = None) -> Legal:
    return Legal(job=base_job(query), devices_per_node=query.machine.devices_per_node, space=space or Space())


@lru_cache(maxsize=len(QUERIES))
def listed(name: str) -> Layouts:
    legal = legal_of(QUERIES[name], replace(FEW, ep=(1, 2, 3, 6)) if name == "uneven" else FEW)
    layouts = list_layouts(legal)
    return with_exchanges(layouts, *exchange_choices(layouts, legal))


def sample(layouts: Layouts, number: int) -> Layouts:
    rows = random.Random(0).sample(range(len(layouts)), min(number, len(layouts)))
    return layouts.take(sorted(rows))  # pyright: ignore[reportArgumentType]


def checked(strategy: Strategy, query: Query) -> Strategy:
    shape = query.shape
    return strategy.check(
        query.world, num_experts=shape.num_experts, num_layers=shape.all_layers, num_heads=shape.num_heads,
        seq_len=query.seq_len, global_batch=query.global_batch, uneven=shape.may_lie_unevenly,
    )  # fmt: skip


@pytest.mark.parametrize("name", QUERIES)
def test_arrays_say_what_the_scalar_planner_says(name: str) -> None:
    query, few = QUERIES[name], sample(listed(name), 25)
    jobs = [few.job_of(row) for row in range(len(few))]
    seconds = [step_time(job, query.machine).step_s for job in jobs]
    assert step_of_each(few, query.machine, fitted()).tolist() == pytest.approx(seconds, rel=1e-9)
    assert memory_of(few).tolist() == pytest.approx([memory(job).allocated_bytes for job in jobs], rel=1e-9)


@pytest.mark.parametrize("name", QUERIES)
def test_every_listed_layout_is_legal_and_listed_once(name: str) -> None:
    query, layouts = QUERIES[name], sample(listed(name), 100)
    strategies = [layouts.strategy(row) for row in range(len(layouts))]
    assert all(checked(replace(each, dp=0), query) == each for each in strategies)
    assert len(set(strategies)) == len(strategies)


SMALL = Space(
    tp=(1, 2), cp=(1,), pp=(1, 4), ep=(1, 4, 8), etp=(1, 2), micro_batch=(1, 2), alltoall=("flat", "rank_dedup"),
    recompute=("none", "full"), zero=(0, 1), overlap=(1, 2),
)  # fmt: skip


def brute_force(query: Query, space: Space) -> list[Strategy]:
    """Every combination of the space's values that Strategy.check lets pass."""
    names = ("tp", "cp", "sequence_parallel", "ep", "etp", "folded", "zero", "recompute", "micro_batch", "alltoall")
    pipelines = [{"pp": pp, "schedule": schedule, "virtual_stages": v} for pp in space.pp for schedule in space.schedule
                 for v in (space.virtual_stages if schedule == "interleaved" else (1,))]  # fmt: skip
    found = []
    for values in product(*(getattr(space, name) for name in names)):
        for pipeline, overlap in product(pipelines, space.overlap):
            try:
                layout = Strategy(**dict(zip(names, values, strict=True)), **pipeline, overlap=overlap)
                found.append(checked(layout, query))
            except ConfigError:
                continue
    return found


def test_the_best_is_the_least_of_all_that_brute_force_finds() -> None:
    small = replace(SMALL, schedule=("1f1b", "zero_bubble"), zero=(1,))
    query = Query(model="mixtral-8x7b", nodes=2, global_batch=64)
    result, steps = search(query, space=small), []
    for strategy in brute_force(query, small):
        try:
            job = query.with_strategy(strategy).job()
        except ConfigError:
            # too few micro-batches
            continue
        if memory(job).fits(query.machine.device.memory_bytes):
            steps.append(step_time(job, query.machine).step_s)
    assert result.best[0].step_s == pytest.approx(min(steps), rel=1e-9)
    # what is not listed is the same as something that is
    assert result.fitting <= len(steps)
    distinct = sorted({float(f"{step:.8e}") for step in steps})
    best = sorted({float(f"{each.step_s:.8e}") for each in result.best})
    assert best == distinct[: len(best)]


def test_slices_of_experts_without_tensor_parallelism_are_searched() -> None:
    query = Query(model="mixtral-8x7b", nodes=2, global_batch=64)
    asked = query.with_strategy(Strategy(ep=8, etp=2, zero=1, recompute="full", micro_batch=2)).job()
    only = replace(
        SMALL, tp=(1,), pp=(1,), ep=(8,), etp=(2,), zero=(1,), recompute=("full",), micro_batch=(2,), overlap=(1,),
        alltoall=("flat",),
    )  # fmt: skip
    found = search(query, space=only).best[0]
    assert found.strategy == asked.strategy
    assert found.step_s == pytest.approx(step_time(asked, query.machine).step_s, rel=1e-9)


def test_ranks_order_by_what_they_say() -> None:
    query = Query(model="mixtral-8x7b", cluster="h800", nodes=4, global_batch=256)
    fast = search(query, nodes=(2, 4, 8), space=SMALL)
    assert [each.step_s for each in fast.best] == sorted(each.step_s for each in fast.best)
    cheap = search(query, nodes=(2, 4, 8), rank="cost", space=SMALL).best
    assert [each.usd_per_step for each in cheap] == sorted(each.usd_per_step or 0 for each in cheap)
    assert cheap[0].devices < fast.best[0].devices
    small = search(query, rank="memory", space=SMALL).best
    assert [each.memory_gib for each in small] == sorted(each.memory_gib for each in small)
    assert small[0].memory_gib < cheap[0].memory_gib


def test_the_front_trades_memory_for_time() -> None:
    result = search(Query(model="mixtral-8x7b", nodes=4, global_batch=256), space=SMALL)
    assert len(result.pareto) > 2
    assert result.pareto[0].step_s == pytest.approx(result.best[0].step_s, rel=1e-9)
    needs = [each.memory_gib for each in result.pareto]
    assert needs == sorted(needs, reverse=True)
    assert undominated(result.pareto) == result.pareto


def test_of_equals_but_for_rounding_one_is_on_the_front() -> None:
    (pick,) = search(ASKED, space=SMALL, top=1).best
    twin = replace(pick, step_s=pick.step_s * (1 + TIE / 2))
    slower_and_smaller = replace(pick, step_s=1.1 * pick.step_s, memory_gib=pick.memory_gib / 2)
    assert undominated((pick, twin, slower_and_smaller)) == (pick, slower_and_smaller)


def test_a_result_prints_the_documented_keys() -> None:
    result = search(Query(model="llama3-8b", cluster="h800", nodes=1, global_batch=32), top=3)
    printed = json.loads(json.dumps(result.to_json()))
    assert {"best", "pareto", "considered", "seconds"} <= set(printed)
    assert {"layout", "step_s", "mfu", "memory_gib", "usd_per_step"} <= set(printed["best"][0])
    assert Strategy(**printed["best"][0]["layout"]) == result.best[0].strategy
    first = result.best[0]
    assert first.usd_per_step == pytest.approx(first.step_s * 8 * 2.0 / 3600)
    assert 0.2 < first.mfu < 0.8


def test_narrow_rows_are_tried_if_asked_for() -> None:
    query = Query(model="mixtral-8x7b", nodes=4, global_batch=256)
    wide = search(query, space=SMALL)
    both = search(query, space=replace(SMALL, dispatch_precision=("", "fp8")))
    assert wide.considered < both.considered <= 2 * wide.considered
    assert both.best[0].strategy.dispatch_precision == "fp8"
    assert both.best[0].step_s < wide.best[0].step_s


def test_a_field_that_changes_nothing_is_not_a_difference() -> None:
    one = Strategy(ep=4, folded=True, recompute="selective")
    assert as_listed(one, FRAMEWORKS["megatron-core"]) == Strategy(ep=4)
    assert as_listed(one, FRAMEWORKS["torchtitan"]) == Strategy(ep=4, recompute="selective")


def test_without_a_price_there_are_no_dollars() -> None:
    query = Query(model="llama3-8b", cluster=replace(CLUSTERS["h800"], usd_per_device_hour=0.0), nodes=1)
    assert search(query, rank="cost").best[0].usd_per_step is None


def test_a_model_too_large_for_its_devices_says_by_how_much() -> None:
    result = search(Query(model="deepseek-v3", nodes=1, global_batch=64))
    assert (result.best, result.pareto, result.fitting) == ((), (), 0)
    assert result.least_memory_gib > 80


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"space": Space(tp=(3,))}, "strategy.tp=3"),
        ({"space": Space(ep=(3,))}, "strategy.ep=3 must divide num_experts=8; nearest legal"),
        ({"rank": "price"}, "rank='price' must be one of: time, cost, memory"),
        ({"top": 0}, "top=0 must be at least 1"),
    ],
)
def test_what_cannot_be_searched_is_named(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        search(Query(model="mixtral-8x7b", nodes=1), **fields)  # type: ignore[arg-type]


def test_a_space_refuses_what_is_no_value() -> None:
    with pytest.raises(ConfigError, match=r"space.tp=0 must be at least 1"):
        Space(tp=(0,))
    with pytest.raises(ConfigError, match="unknown all-to-all program 'flt'"):
        Space(alltoall=("flt",))


# --- why not ---

ASKED = Query(model="mixtral-8x7b", nodes=4, global_batch=256)
NEAR = Space(micro_batch=(1, 2), alltoall=("flat",), zero=(0, 1), etp=(1,))


def test_an_illegal_layout_is_answered_with_its_error() -> None:
    answer = why_not(ASKED, Strategy(tp=3))
    assert answer.kind == "illegal"
    assert "tp=3" in answer.text
    assert "nearest legal" in answer.text


def test_a_layout_that_does_not_fit_says_how_many_bytes_where_and_of_what() -> None:
    answer = why_not(ASKED, Strategy(pp=4, ep=2), space=NEAR)
    job = ASKED.with_strategy(Strategy(pp=4, ep=2)).job()
    assert answer.kind == "memory"
    assert answer.over_bytes == pytest.approx(1.045 * memory(job).allocated_bytes + 1.5 * 2**30 - 80e9)
    assert answer.stage == memory(job).stage
    assert answer.needs_bytes
    assert sum(answer.needs_bytes.values()) == pytest.approx(memory(job).allocated_bytes)
    assert answer.better
    assert answer.better.memory_gib < 80e9 / 2**30


def test_a_slower_layout_says_by_how_much_where_and_what_to_change() -> None:
    named = search(ASKED, space=NEAR).best[0].strategy
    slow = replace(named, dp=0, recompute="full", zero=1)
    answer = why_not(ASKED, slow, space=NEAR)
    assert answer.kind == "slower"
    assert answer.longer_s
    assert next(iter(answer.longer_s)) == "compute"
    assert answer.step_s is not None
    assert answer.pick_step_s is not None
    assert sum(answer.longer_s.values()) == pytest.approx(answer.step_s - answer.pick_step_s)
    assert answer.better
    assert len(answer.better.fields) == 1
    assert answer.better.step_s < answer.step_s
    changed = {name: new for name, (_, new) in answer.better.fields.items()}
    better = ASKED.with_strategy(replace(slow, **changed)).job()
    assert step_time(better, ASKED.machine).step_s == pytest.approx(answer.better.step_s, rel=1e-9)


def test_the_pick_is_known_as_the_pick() -> None:
    answer = why_not(ASKED, replace(search(ASKED, space=NEAR).best[0].strategy, dp=0), space=NEAR)
    assert (answer.kind, answer.text) == ("pick", "it is the pick")
    assert json.dumps(answer.to_json())


def test_a_layout_the_search_leaves_out_says_what_is_left_out() -> None:
    best = search(ASKED, space=NEAR).best[0].strategy
    few = replace(Space(), tp=(8,), zero=(0,), recompute=("full",))
    answer = why_not(ASKED, replace(best, dp=0), space=few)
    assert answer.kind == "outside"
    assert "is not searched" in answer.text


# --- speed ---


def test_a_hundred_thousand_layouts_take_less_than_five_seconds() -> None:
    query = QUERIES["mixtral"]
    started = time.process_time()
    result = search(query)
    assert result.fitting >= 100_000
    assert time.process_time() - started < 5.0


def test_a_hundred_thousand_devices_are_as_fast_as_eight() -> None:
    few = Space(tp=(1, 2, 4, 8), cp=(1,), pp=(1, 2, 4), ep=(1, 8), etp=(1,), micro_batch=(1,), virtual_stages=(2,))
    seconds = {}
    for nodes in (2, 12_500, 2, 12_500):
        started = time.process_time()
        search(Query(model="mixtral-8x7b", nodes=nodes, global_batch=8 * nodes), space=few)
        seconds[nodes] = time.process_time() - started
    assert seconds[12_500] < 2 * seconds[2] + 0.1


def test_asking_for_one_step_loads_no_arrays() -> None:
    code = """
import sys
from turnout.plan.query import Query
from turnout.plan.search import search
from turnout.plan.why_not import why_not
from turnout.plan.time import step_time
query = Query(model="mixtral-8x7b", nodes=1, global_batch=8)
step_time(query.job(), query.machine)
assert "numpy" not in sys.modules
search(query)
assert "numpy" in sys.modules and "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_divisors_and_powers() -> None:
    assert divisors(72) == (1, 2, 3, 4, 6, 8, 9, 12, 18, 24, 36, 72)
    assert powers(9) == (1, 2, 4, 8)
    assert isinstance(PYRAMID, ModelShape)


def test_a_framework_is_searched_with_its_own_schedules_and_recomputation() -> None:
    query = Query(model="deepseek-v3", cluster="h800", nodes=32, global_batch=1024)
    for framework, schedules in (("megatron-core", {"1f1b", "interleaved"}), ("nanotron", {"1f1b"}),
                                 ("deepseek", {"1f1b", "zero_bubble", "dualpipe"})):  # fmt: skip
        legal = legal_of(replace(query, framework=framework))
        assert {each["schedule"] for each in legal.pipelines()} == schedules
        kinds = {each["recompute"] for each in legal.recomputations()}
        assert ("light" in kinds) == FRAMEWORKS[framework].light_recompute
    asked = legal_of(query, Space(schedule=("dualpipe",)))
    assert {each["schedule"] for each in asked.pipelines()} == {"dualpipe"}
