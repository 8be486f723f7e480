"""Laws of the planner that hold for every layout: bandwidth, merging, conservation, batch, links."""

import random
import re
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.alltoall import PROGRAMS, RoutedTokens, RowSize, pairs_of, round_trip, traffic_of
from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.columns import Layouts
from turnout.plan.evaluation import base_job
from turnout.plan.job import Job
from turnout.plan.listing import exchange_choices, list_layouts, with_exchanges
from turnout.plan.memory import memory
from turnout.plan.query import Query
from turnout.plan.search import search
from turnout.plan.space import Legal, Space
from turnout.plan.step import step_of
from turnout.plan.time import step_time
from turnout.plan.volume import to_json, volume
from turnout.strategy import Strategy
from turnout.topology import Mesh

QUERY = Query(model="mixtral-8x7b", nodes=4, global_batch=256)
LEGAL = Legal(job=base_job(QUERY), devices_per_node=8, space=Space(micro_batch=(1, 2, 4), virtual_stages=(2,)))


@lru_cache(maxsize=1)
def layouts() -> Layouts:
    listed = list_layouts(LEGAL)
    return with_exchanges(listed, *exchange_choices(listed, LEGAL))


JOBS = st.deferred(lambda: st.integers(0, len(layouts()) - 1).map(layouts().job_of))
MESHES = st.sampled_from([Mesh(nodes=1, local=4), Mesh(nodes=4), Mesh(nodes=2, local=3), Mesh(nodes=3, local=2)])


@settings(max_examples=75, deadline=None)
@given(job=JOBS, times=st.floats(1.0, 16.0), tier=st.sampled_from(["intra", "inter"]))
def test_more_bandwidth_never_slows_a_plan(job: Job, times: float, tier: str) -> None:
    cluster = CLUSTERS["dgx-h100"]
    link = getattr(cluster, tier)
    faster = replace(cluster, **{tier: replace(link, bytes_per_s=times * link.bytes_per_s)})
    assert step_time(job, faster).step_s <= step_time(job, cluster).step_s * (1 + 1e-9)


@pytest.mark.parametrize("tier", ["intra", "inter"])
def test_more_bandwidth_never_slows_the_pick(tier: str) -> None:
    space = Space(micro_batch=(1, 2), cp=(1,), zero=(1, 3), etp=(1,), virtual_stages=(2,), recompute=("none", "full"))
    steps = []
    for times in (1, 2, 8):
        link = getattr(CLUSTERS["dgx-h100"], tier)
        faster = replace(link, bytes_per_s=times * link.bytes_per_s)
        cluster = replace(CLUSTERS["dgx-h100"], **{tier: faster})
        steps.append(search(replace(QUERY, cluster=cluster), space=space, top=1).best[0].step_s)
    assert steps == sorted(steps, reverse=True)


@settings(max_examples=75, deadline=None)
@given(job=JOBS)
def test_merging_copies_never_adds_bytes_between_nodes(job: Job) -> None:
    flat, merged = (
        sum(
            part.inter_bytes
            for part in volume(step_of(replace(job, strategy=replace(job.strategy, alltoall=name)), 8))
            if part.axis == "ep"
        )
        for name in ("flat", "node_dedup")
    )
    # a label of 8 bytes travels with rows of 8,192
    assert merged <= flat * (1 + 1e-3)


@settings(max_examples=75, deadline=None)
@given(job=JOBS)
def test_the_sum_over_links_is_the_total(job: Job) -> None:
    parts = volume(step_of(job, 8))
    printed = to_json(parts, lambda part: 0.0)
    total = sum(part.total_bytes for part in parts)
    assert printed["intra_bytes"] + printed["inter_bytes"] == pytest.approx(total, rel=1e-12)
    assert all(part.inter_bytes == 0 for part in parts if part.mesh.nodes == 1)
    assert all(part.intra_bytes == 0 for part in parts if part.mesh.local == 1 and part.axis != "ep")


@settings(max_examples=75, deadline=None)
@given(job=JOBS)
def test_of_what_leaves_a_node_some_goes_to_its_own_place(job: Job) -> None:
    for part in volume(step_of(job, 8)):
        assert 0 <= part.cross_bytes <= part.inter_bytes * (1 + 1e-12)
        assert 0 <= part.cross_messages <= part.inter_messages * (1 + 1e-12)
        # two levels and merging go to equal places first, and a ring is as many rings as a node has cards
        if part.axis != "ep" or job.strategy.alltoall in ("hierarchical", "node_dedup") or part.mesh.local == 1:
            assert part.cross_bytes == 0
        else:
            assert part.cross_bytes == pytest.approx(part.inter_bytes * (1 - 1 / part.mesh.local), rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(mesh=MESHES, tokens=st.integers(0, 9), seed=st.integers(0, 99), program=st.sampled_from(PROGRAMS.names()))
def test_what_is_sent_comes_back(mesh: Mesh, tokens: int, seed: int, program: str) -> None:
    draw = random.Random(seed)
    tensor = 2 if program == "coordinated" else 1
    routing = RoutedTokens(
        mesh, [[draw.choices(range(mesh.size), k=2) for _ in range(tokens)] for _ in range(mesh.size)]
    )
    moves = round_trip(PROGRAMS[program], mesh, tensor)
    size = RowSize(row_bytes=4.0, back_bytes=4.0)
    there, back = (
        pairs_of(tuple(m for m in moves if m.back is way and m.axes), routing, size, tensor=tensor)
        for way in (False, True)
    )
    # what a rank sent to another it is sent back, and over all ranks as much is received as sent
    assert {(b, a): sent[0] for (a, b), sent in there.items() if sent[0]} == {
        pair: sent[0] for pair, sent in back.items() if sent[0]
    }
    sent, received = defaultdict(float), defaultdict(float)
    for (sender, receiver), (amount, _) in {**there}.items():
        sent[sender] += amount
        received[receiver] += amount
    assert sum(sent.values()) == sum(received.values())
    # and the ledger of pairs is the ledger of tiers
    traffic = traffic_of(moves, routing, size, tensor=tensor)
    pairs = pairs_of(moves, routing, size, tensor=tensor)
    assert traffic.total_bytes * mesh.size * tensor == pytest.approx(sum(each for each, _ in pairs.values()))


@settings(max_examples=100, deadline=None)
@given(job=JOBS)
def test_memory_grows_with_the_micro_batch_and_never_falls_with_the_batch(job: Job) -> None:
    larger = replace(job, strategy=replace(job.strategy, micro_batch=2 * job.strategy.micro_batch))
    longer = replace(job, seq_len=2 * job.seq_len)
    assert memory(longer).allocated_bytes > memory(job).allocated_bytes
    more = replace(job, global_batch=2 * job.global_batch)
    assert memory(more).allocated_bytes >= memory(job).allocated_bytes
    # as many micro-batches, each twice as large
    assert memory(replace(larger, global_batch=2 * job.global_batch)).allocated_bytes > memory(job).allocated_bytes


@settings(max_examples=60, deadline=None)
@given(job=JOBS, more=st.floats(1.0, 4.0), field=st.sampled_from(["skew", "capacity_factor"]))
def test_neither_skew_nor_padding_saves_time_or_memory(job: Job, more: float, field: str) -> None:
    if job.strategy.alltoall.endswith("_dedup"):
        job = replace(job, strategy=replace(job.strategy, alltoall="flat"))
    asked = replace(job, **{field: more})
    cluster = CLUSTERS["dgx-h100"]
    assert step_time(asked, cluster).step_s >= step_time(job, cluster).step_s * (1 - 1e-9)
    assert memory(asked).allocated_bytes >= memory(job).allocated_bytes * (1 - 1e-9)
    # as many rows on the busiest rank cost it as much to compute, whether they are routed to it or padding
    assert asked.expert_rows == pytest.approx(job.expert_rows * (asked.padding * asked.busiest), rel=1e-12) or (
        job.strategy.expert_parts == 0
    )


@settings(max_examples=60, deadline=None)
@given(job=JOBS, times=st.integers(2, 4))
def test_a_larger_batch_takes_longer_and_no_more_than_as_many_times(job: Job, times: int) -> None:
    once = step_time(job, CLUSTERS["dgx-h100"]).step_s
    more = step_time(replace(job, global_batch=times * job.global_batch), CLUSTERS["dgx-h100"]).step_s
    assert once < more <= times * once * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 80), pp=st.sampled_from([2, 4, 8]), size=st.sampled_from([1, 2]),
       schedule=st.sampled_from(["1f1b", "interleaved", "zero_bubble", "dualpipe", "gpipe"]))  # fmt: skip
def test_the_nearest_legal_batch_is_legal(batch: int, pp: int, size: int, schedule: str) -> None:
    chunks = 2 if schedule == "interleaved" else 1
    strategy = Strategy(tp=2, pp=pp, schedule=schedule, virtual_stages=chunks, micro_batch=size)
    query = replace(QUERY, global_batch=batch, strategy=strategy)
    for _ in range(3):
        try:
            job = query.job()
            break
        except ConfigError as error:
            (near,) = re.findall(r"nearest legal: (?:global_batch=)?(\d+)", str(error))
            query = replace(query, global_batch=int(near))
    else:
        raise AssertionError(query.global_batch)
    assert step_time(job, query.machine).step_s > 0
