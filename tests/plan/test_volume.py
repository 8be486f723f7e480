"""Volume: the closed forms hold, experts' bytes are those that rows really move, and every byte is on one link."""

import random
import time
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.alltoall import (
    PROGRAMS,
    LoadedRouting,
    LoopbackTransport,
    combine,
    dispatch,
    expected_distinct,
    load,
    pairs_of,
    round_trip,
)
from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.collectives import all_gather, all_reduce, all_to_all, group, pipeline_sends
from turnout.plan.data_volume import dense_stage_params, expert_data_mesh
from turnout.plan.expert_volume import expert_mesh, row_size
from turnout.plan.job import Job
from turnout.plan.memory import memory
from turnout.plan.model import ModelShape
from turnout.plan.pipeline import stages
from turnout.plan.shapes import SHAPES
from turnout.plan.step import Step, step_of
from turnout.plan.volume import to_json, volume
from turnout.strategy import Strategy
from turnout.topology import Mesh

H, LAYERS, TOKENS, MICRO, A = 64, 12, 960.0, 4, 2
DENSE = ModelShape(
    num_layers=LAYERS, dim=H, vocab_size=128, num_heads=8, num_kv_heads=4, head_dim=8, ffn_hidden=256, gated=False
)
SPARSE = replace(DENSE, num_experts=8, top_k=2, expert_hidden=256)


def step(shape: ModelShape = DENSE, node: int = 8, **fields: object) -> Step:
    strategy = Strategy(**{"dp": 1} | fields)
    return Step(shape=shape, strategy=strategy, devices_per_node=node, tokens=TOKENS, micro_batches=MICRO)


def sent(parts: object, *names: str) -> tuple[float, float]:
    found = [part for part in parts if part.name in names]
    return sum(part.intra_bytes for part in found), sum(part.inter_bytes for part in found)


@pytest.mark.parametrize("pp", [1, 3])
@pytest.mark.parametrize(("recompute", "reduces"), [("none", 4), ("selective", 4), ("full", 6)])
def test_tensor_parallel_sends_four_all_reduces_a_layer_or_six(pp: int, recompute: str, reduces: int) -> None:
    parts = volume(step(tp=8, pp=pp, recompute=recompute))
    want = reduces * 2 * 7 / 8 * TOKENS * H * A * LAYERS / pp
    assert sent(parts, "tp all-reduce") == (pytest.approx(want, rel=1e-9), 0.0)


def test_sequence_parallel_sends_the_same_bytes_and_gathers_inputs_again() -> None:
    tensor = sent(volume(step(tp=8)), "tp all-reduce")[0]
    parts = volume(step(tp=8, sequence_parallel=True))
    assert sent(parts, "sp all-gather", "sp reduce-scatter")[0] == pytest.approx(tensor, rel=1e-9)
    assert sent(parts, "sp regather")[0] == pytest.approx(tensor / 4, rel=1e-9)
    chunks = volume(step(tp=8, sequence_parallel=True, tp_overlap=4))
    for name in ("sp all-gather", "sp reduce-scatter", "sp regather"):
        whole, cut = (next(part for part in found if part.name == name) for found in (parts, chunks))
        assert (cut.total_bytes, cut.messages) == (whole.total_bytes, 4 * whole.messages)
    embedding = sent(volume(step(tp=8)), "embedding and head")
    assert sent(parts, "embedding and head") == pytest.approx(embedding, rel=1e-9)


def test_context_parallel_ring_sends_keys_and_values_once_forward_and_twice_backward() -> None:
    cp = 4
    parts = volume(replace(step(cp=cp, node=1), tokens=TOKENS / cp))
    want = 3 * (cp - 1) * TOKENS / cp * 2 * 4 * 8 * A * LAYERS
    assert sent(parts, "cp ring") == (0.0, pytest.approx(want, rel=1e-9))


def test_context_parallel_by_heads_sends_four_exchanges_each_way() -> None:
    cp = 4
    heads = replace(DENSE, num_kv_heads=8)
    parts = volume(replace(step(heads, cp=cp, cp_kind="alltoall"), tokens=TOKENS / cp))
    want = 2 * 4 * (cp - 1) / cp * TOKENS / cp * H * A * LAYERS
    assert sent(parts, "cp all-to-all") == (pytest.approx(want, rel=1e-9), 0.0)


@pytest.mark.parametrize(
    ("fields", "share"), [({}, 1), ({"scatter_gather": True}, 8), ({"sequence_parallel": True}, 8)]
)
def test_an_inner_stage_sends_activations_on_and_gradients_back(fields: dict[str, bool], share: int) -> None:
    parts = volume(step(tp=8, pp=3, **fields))
    assert sent(parts, "pp send") == (0.0, pytest.approx(2 * TOKENS * H * A / share, rel=1e-9))


def test_interleaving_multiplies_what_stages_send() -> None:
    once = sent(volume(step(tp=8, pp=3)), "pp send")[1]
    thrice = sent(volume(step(tp=8, pp=3, virtual_stages=3, schedule="interleaved")), "pp send")[1]
    assert thrice == pytest.approx(3 * once, rel=1e-9)


@pytest.mark.parametrize("pp", [1, 2, 3, 5])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_the_busiest_rank_sends_what_a_walk_through_the_chunks_counts(pp: int, virtual: int) -> None:
    chunks, sends = pp * virtual, [0] * pp
    for chunk in range(chunks):
        on, back = chunk + 1, chunk - 1
        sends[chunk % pp] += (on < chunks and on % pp != chunk % pp) + (back >= 0 and back % pp != chunk % pp)
    assert pipeline_sends(pp, virtual) == max(sends)


@pytest.mark.parametrize(("zero", "times"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.5)])
def test_data_parallel_sends_twice_the_gradients_and_zero_3_half_more(zero: int, times: float) -> None:
    dp, params = 16, DENSE.dense_params
    parts = volume(replace(step(dp=dp, node=1, zero=zero, grad_precision="bf16"), reshards=False))
    assert sum(part.inter_bytes for part in parts) == pytest.approx(times * 2 * (dp - 1) / dp * params * 2, rel=1e-9)


def test_zero_3_that_reshards_pays_for_every_micro_batch() -> None:
    once = volume(replace(step(dp=4, node=1, zero=3), reshards=False))
    each = volume(step(dp=4, node=1, zero=3))
    assert sum(part.inter_bytes for part in each) == pytest.approx(MICRO * sum(part.inter_bytes for part in once))


def test_gradients_that_are_summed_once_a_step_are_sent_once() -> None:
    each, once = (volume(step(dp=4, node=1, zero=3, zero_sum=how)) for how in ("micro_batch", "step"))
    summed = [next(p for p in parts if p.name == "dense gradient reduce-scatter") for parts in (each, once)]
    assert summed[0].inter_bytes == pytest.approx(MICRO * summed[1].inter_bytes)


def test_hsdp_gathers_inside_the_shard_and_sums_between_copies() -> None:
    parts = volume(step(dp=32, zero=3, zero_size=8))
    gathered = [part for part in parts if part.name == "dense parameter all-gather"]
    assert [(part.mesh, part.inter_bytes) for part in gathered] == [(Mesh(nodes=1, local=8), 0.0)]
    copies = next(part for part in parts if part.name == "dense shard all-reduce")
    assert copies.mesh == Mesh(nodes=4)
    assert copies.inter_bytes == pytest.approx(2 * 3 / 4 * DENSE.dense_params / 8 * 4)


@pytest.mark.parametrize("etp", [1, 8])
def test_experts_are_summed_over_their_own_copies(etp: int) -> None:
    strategy = {"tp": 8, "dp": 16, "ep": 8, "etp": etp, "grad_precision": "bf16"}
    part = next(p for p in volume(step(SPARSE, **strategy)) if p.axis == "edp")
    copies = 8 * 16 // (8 * etp)
    held = LAYERS * 8 * SPARSE.expert_params / (8 * etp)
    assert part.mesh.size == copies
    assert part.total_bytes == pytest.approx(2 * (copies - 1) / copies * held * 2, rel=1e-9)


@pytest.mark.parametrize(("shard", "tokens"), [(False, TOKENS), (True, TOKENS / 8)])
@pytest.mark.parametrize("capacity_factor", [1.0, 1.25])
def test_linear_expert_traffic_is_four_exchanges_a_layer(shard: bool, tokens: float, capacity_factor: float) -> None:
    asked = replace(step(SPARSE, tp=8, dp=8, ep=8, etp=8, shard_tokens=shard), capacity_factor=capacity_factor)
    want = 4 * 2 * capacity_factor * tokens * H * A * 7 / 8 * LAYERS
    assert sent(volume(asked), "ep all-to-all") == (0.0, pytest.approx(want, rel=1e-9))


@pytest.mark.parametrize("node", [2, 8])
@pytest.mark.parametrize("skew", [1.0, 1.5, 8.0])
def test_the_busiest_rank_gets_skew_times_the_mean_as_loads_of_that_skew_say(skew: float, node: int) -> None:
    shape = replace(SPARSE, num_experts=16)
    job = Job(shape=shape, strategy=Strategy(dp=8, ep=8), seq_len=64, global_batch=8, skew=skew)
    parts = volume(step_of(job, node))
    (row,) = [
        row for row in to_json(parts, lambda _: 1.0, job.busiest)["collectives"] if row["name"] == "ep all-to-all"
    ]
    # the last rank has so much of all rows, the others share the rest
    mean = (8 - skew) / 7
    loads = (*(mean,) * 14, skew, skew)
    mesh = expert_mesh(job.strategy, node)
    routing = LoadedRouting(mesh=mesh, num_tokens=job.routed_tokens, top_k=2, loads=loads)
    size = row_size(job.strategy, H)
    there = tuple(move for move in round_trip(PROGRAMS["flat"], mesh) if not move.back)
    received = sum(each[0] for (_, to), each in pairs_of(there, routing, size).items() if to == 7)
    assert row["busiest_bytes"] == pytest.approx(4 * LAYERS * received, rel=1e-9)
    assert row["seconds"] == pytest.approx(skew)
    others = [other for other in to_json(parts, lambda _: 1.0, skew)["collectives"] if other["axis"] != "ep"]
    assert all(other["busiest_bytes"] == other["intra_bytes"] + other["inter_bytes"] for other in others)


@pytest.mark.parametrize("ep", [3, 5, 6, 7])
def test_where_ep_does_not_divide_the_experts_the_fullest_rank_decides(ep: int) -> None:
    fullest = -(-8 // ep)
    job = Job(shape=SPARSE, strategy=Strategy(dp=ep, ep=ep), seq_len=64, global_batch=ep)
    # as many experts on every rank as on the fullest, and no row beyond those
    alike = Job(shape=replace(SPARSE, num_experts=fullest * ep), strategy=job.strategy, seq_len=64, global_batch=ep)
    assert job.held_experts == fullest
    assert job.expert_rows == pytest.approx(64 * 2 * fullest * ep / 8)
    full, other = memory(job), memory(alike)
    assert full.optimizer_bytes - other.optimizer_bytes == pytest.approx(
        12 * LAYERS * (SPARSE.router_params(0) - alike.shape.router_params(0)), rel=1e-9
    )
    assert full.moe_bytes > other.moe_bytes
    even = [Job(shape=SPARSE, strategy=Strategy(dp=8, ep=n), seq_len=64, global_batch=8) for n in (2, 4, 8)]
    assert [each.crowding for each in even] == [1.0, 1.0, 1.0]
    # bytes are those of the mean rank, and a trace of equal loads has the same
    for name in ("flat", "node_dedup"):
        asked = replace(job, strategy=replace(job.strategy, alltoall=name))
        step = step_of(asked, 3 if ep == 6 else 8)
        (part,) = [each for each in volume(step) if each.axis == "ep"]
        (traced,) = [each for each in volume(replace(step, expert_loads=(1.0,) * 8)) if each.axis == "ep"]
        # rows merged per node are an estimate from loads
        assert part.total_bytes == pytest.approx(traced.total_bytes, rel=1e-9 if name == "flat" else 0.1)


def test_no_rank_gets_more_than_all_rows() -> None:
    skewed = [
        Job(shape=SPARSE, strategy=Strategy(dp=8, ep=ep), seq_len=64, global_batch=8, skew=3.0) for ep in (1, 2, 4)
    ]
    assert [job.expert_rows / 64 / 2 for job in skewed] == [1.0, 2.0, 3.0]


def test_a_capacity_pads_what_is_sent_and_computed_and_nothing_else() -> None:
    plain = Job(shape=SPARSE, strategy=Strategy(dp=8, ep=8), seq_len=64, global_batch=8)
    padded = replace(plain, capacity_factor=1.25)
    assert padded.expert_rows == 1.25 * plain.expert_rows
    for less, more in zip(volume(step_of(plain, 2)), volume(step_of(padded, 2)), strict=True):
        times = 1.25 if less.name == "ep all-to-all" else 1.0
        assert (more.intra_bytes, more.inter_bytes) == (
            pytest.approx(times * less.intra_bytes, rel=1e-12), pytest.approx(times * less.inter_bytes, rel=1e-12)
        )  # fmt: skip
        assert more.messages == less.messages


def test_experts_in_a_node_share_the_exchange_between_the_tiers() -> None:
    intra, inter = sent(volume(step(SPARSE, dp=8, ep=8, node=2)), "ep all-to-all")
    whole = 4 * 2 * TOKENS * H * A * LAYERS
    assert (intra, inter) == (pytest.approx(whole * 1 / 8, rel=1e-9), pytest.approx(whole * 6 / 8, rel=1e-9))


def test_cut_experts_gather_and_scatter_the_routed_rows() -> None:
    parts = volume(step(SPARSE, tp=4, sequence_parallel=True, dp=8, ep=8, etp=4))
    want = 4 * 3 / 4 * 2 * TOKENS * H * A * LAYERS
    assert sent(parts, "etp gather and scatter")[0] == pytest.approx(want, rel=1e-9)


def test_full_recomputation_dispatches_again() -> None:
    parts = volume(step(SPARSE, dp=8, ep=8, node=1, recompute="full"))
    assert sent(parts, "ep recompute")[1] == pytest.approx(sent(parts, "ep all-to-all")[1] / 2, rel=1e-9)


def test_overlap_multiplies_messages_and_leaves_bytes() -> None:
    whole, chunks = (
        next(p for p in volume(step(SPARSE, dp=8, ep=8, overlap=overlap)) if p.axis == "ep") for overlap in (1, 4)
    )
    assert chunks.messages == 4 * whole.messages
    assert (chunks.intra_bytes, chunks.inter_bytes) == (whole.intra_bytes, whole.inter_bytes)


@pytest.mark.parametrize("name", PROGRAMS.names())
def test_expert_bytes_and_messages_are_those_rows_move_over_every_choice_of_experts(name: str) -> None:
    """Each rank routes one token to every set of k experts, which is uniform routing to the last byte."""
    draw = random.Random(3)
    for _ in range(12):
        node, ep = draw.choice([(1, 3), (2, 4), (2, 6), (3, 6), (4, 4)])
        experts = ep * draw.choice([1, 2]) if ep < 6 else ep
        top_k = draw.randint(1, 3)
        shape = replace(SPARSE, num_experts=experts, top_k=top_k, num_layers=1)
        strategy = Strategy(dp=ep, ep=ep, alltoall=name, dispatch_precision="fp8")
        sets = list(combinations(range(experts), top_k))
        asked = Step(shape=shape, strategy=strategy, devices_per_node=node, tokens=float(len(sets)), micro_batches=1)
        part = next(p for p in volume(asked) if p.axis == "ep")
        mesh = expert_mesh(strategy, node)
        tokens = [[[e * ep // experts for e in chosen] for chosen in sets]] * ep
        want = [0.0, 0.0, 0.0, 0.0]
        for labels in (True, False):
            moved = LoopbackTransport(mesh, row_size(strategy, H, labels=labels))
            combine(PROGRAMS[name], moved, dispatch(PROGRAMS[name], moved, load(tokens, lambda *_: 0)))
            for (sender, receiver), (size, messages) in moved.moved.items():
                crosses = sender // mesh.local != receiver // mesh.local
                want[crosses] += size / ep
                want[2 + crosses] += messages / ep
        got = [part.intra_bytes, part.inter_bytes, part.intra_messages, part.inter_messages]
        assert got == pytest.approx(want, rel=1e-9)


def test_labels_travel_with_merged_rows_once_and_the_gradients_of_their_weights_come_back() -> None:
    parts = volume(step(replace(SPARSE, num_layers=1), dp=8, ep=8, node=2, alltoall="node_dedup"))
    copies = expected_distinct(8, 4, 2) * 3 / 4
    rows, labels = 4 * copies * TOKENS * H * A, 2 * TOKENS * 3 / 4 * (8 + 4)
    assert sent(parts, "ep all-to-all")[1] == pytest.approx(rows + labels, rel=1e-9)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("etp", [1, 4])
@pytest.mark.parametrize("node", [1, 4, 8, 16])
def test_expert_ranks_lie_on_the_nodes_their_numbers_say(folded: bool, etp: int, node: int) -> None:
    strategy = Strategy(tp=4, dp=16, ep=8, etp=etp, folded=folded, shard_tokens=folded)
    stride = etp if folded else 4
    peers, copies = [], []
    for rank in range(64):
        within, beyond = rank % stride, rank // stride
        if within == 0 and beyond // 8 == 0:
            peers.append(rank)
        if beyond % 8 == 0 and (within == 0 or etp < stride):
            copies.append(rank)
    for mesh, ranks in ((expert_mesh(strategy, node), peers), (expert_data_mesh(strategy, node), copies)):
        assert (mesh.size, mesh.nodes) == (len(ranks), len({rank // node for rank in ranks}))


@pytest.mark.parametrize(
    ("program", "limit", "inter_gb", "inter_s"), [("node_dedup", 4, 271.0, 5.4), ("flat", 0, 542.0, 10.8)]
)
def test_deepseek_v3_seconds_on_the_network_card(program: str, limit: int, inter_gb: float, inter_s: float) -> None:
    """15,360 sequences of 4,096 on 2,048 devices: fp8 dispatch, bf16 combine, 50 GB/s a card."""
    strategy = Strategy(pp=16, ep=64, dispatch_precision="fp8", alltoall=program, zero=1).check(2048, num_experts=256)
    job = Job(shape=SHAPES["deepseek-v3"], strategy=strategy, seq_len=4096, global_batch=15_360)
    got = sent(volume(step_of(job, 8, node_limit=limit)), "ep all-to-all")[1]
    assert got / 1e9 == pytest.approx(inter_gb, rel=2e-3)
    assert got / 50e9 == pytest.approx(inter_s, abs=0.05)


LAYOUTS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 8]), "cp": st.sampled_from([1, 2]), "pp": st.sampled_from([1, 2, 3]),
        "dp": st.sampled_from([4, 8]), "ep": st.sampled_from([1, 2, 4]), "zero": st.sampled_from([0, 1, 3]),
        "recompute": st.sampled_from(["none", "full"]), "shard_tokens": st.booleans(),
    }
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(fields=LAYOUTS, node=st.sampled_from([1, 2, 4, 8, 16]), cut=st.booleans())
def test_where_nodes_end_moves_bytes_between_tiers_but_never_makes_any(
    fields: dict[str, object], node: int, cut: bool
) -> None:
    layout = fields | {"etp": fields["tp"] if cut else 1}
    whole = {part.name: part for part in volume(step(SPARSE, node=10**6, **layout))}
    split = {part.name: part for part in volume(step(SPARSE, node=node, **layout))}
    assert whole.keys() == split.keys()
    for name, part in split.items():
        assert whole[name].inter_bytes == 0.0
        assert part.total_bytes == pytest.approx(whole[name].intra_bytes, rel=1e-9)
        assert part.messages == pytest.approx(whole[name].messages, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(fields=LAYOUTS, node=st.sampled_from([1, 2, 4, 8]))
def test_merging_rows_never_adds_bytes_between_nodes(fields: dict[str, object], node: int) -> None:
    # rows are a vector each; what a label adds is under a thousandth of it at this width
    wide = replace(SPARSE, dim=8192)
    inter = {
        name: sent(volume(step(wide, node=node, alltoall=name, **fields)), "ep all-to-all")[1]
        for name in ("flat", "node_dedup", "rank_dedup")
    }
    slack = 1 + 8 / (8192 * 2)
    assert inter["node_dedup"] <= inter["rank_dedup"] * slack <= inter["flat"] * slack * slack


@settings(max_examples=40, deadline=None)
@given(fields=LAYOUTS)
def test_the_mean_over_stages_is_the_mean_of_the_stages(fields: dict[str, object]) -> None:
    asked = step(SPARSE, **fields)
    mean = {part.name: part.total_bytes for part in volume(asked)}
    cut = stages(SPARSE, asked.strategy.pp)
    for name in ("tp all-reduce", "ep all-to-all", "expert gradient all-reduce", "embedding and head"):
        parts = [part for stage in cut for part in volume(replace(asked, stage=stage)) if part.name == name]
        assert sum(part.total_bytes for part in parts) / len(cut) == pytest.approx(mean.get(name, 0.0), rel=1e-9)


@pytest.mark.parametrize(("nodes", "local"), [(1, 4), (4, 1), (3, 2), (2, 8)])
def test_ring_bytes_are_those_of_a_ring_walked_hop_by_hop(nodes: int, local: int) -> None:
    mesh, size = Mesh(nodes=nodes, local=local), 960.0
    tiers = [0.0, 0.0]
    for rank in range(mesh.size):
        crosses = rank // local != (rank + 1) % mesh.size // local
        tiers[crosses] += (mesh.size - 1) * size / mesh.size / mesh.size
    got = all_gather(mesh, size)
    assert [got.intra_bytes, got.inter_bytes] == pytest.approx(tiers, rel=1e-9)
    assert all_reduce(mesh, size).total_bytes == pytest.approx(2 * got.total_bytes, rel=1e-9)
    assert all_to_all(mesh, size).total_bytes == pytest.approx(got.total_bytes, rel=1e-9)


@pytest.mark.parametrize(
    ("size", "stride", "node"), [(16, 8, 8), (8, 2, 8), (4, 1, 8), (64, 1, 72), (6, 1, 4), (3, 4, 8)]
)
def test_groups_have_the_nodes_their_ranks_lie_on(size: int, stride: int, node: int) -> None:
    mesh = group(size, stride, node)
    assert mesh.size == size
    ranks = [stride * place for place in range(size)]
    on_first = sum(rank < node for rank in ranks)
    assert mesh.local <= on_first
    if size % on_first == 0 and node % (stride * on_first) == 0:
        assert mesh.nodes == len({rank // node for rank in ranks})


def test_a_trace_of_equal_loads_asks_for_what_uniform_routing_does() -> None:
    asked = step(SPARSE, dp=8, ep=8, node=2, alltoall="node_dedup")
    traced = volume(replace(asked, expert_loads=(3.0,) * 8))
    assert sent(traced, "ep all-to-all") == pytest.approx(sent(volume(asked), "ep all-to-all"), rel=1e-9)
    # one node's experts idle: nothing crosses to it, so what crosses is what the others get
    idle = volume(replace(asked, expert_loads=(1.0,) * 6 + (0.0,) * 2))
    assert sent(idle, "ep all-to-all")[1] < sent(traced, "ep all-to-all")[1]
    with pytest.raises(ConfigError, match="expert_loads has 4 experts; a layer has 8"):
        volume(replace(asked, expert_loads=(1.0,) * 4))


def test_a_volume_prints_the_documented_keys() -> None:
    parts = volume(step(SPARSE, tp=8, dp=8, ep=8))
    printed = to_json(parts, lambda part: max(part.tiers_s(CLUSTERS["dgx-a100"])))
    keys = {"name", "intra_bytes", "inter_bytes", "messages", "seconds"}
    assert all(keys <= set(row) and row["seconds"] > 0 for row in printed["collectives"])
    for tier in ("intra_bytes", "inter_bytes"):
        assert printed[tier] == pytest.approx(sum(row[tier] for row in printed["collectives"]), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(fields=LAYOUTS, faster=st.floats(1, 100))
def test_more_bandwidth_never_slows_a_collective(fields: dict[str, object], faster: float) -> None:
    cluster = CLUSTERS["dgx-a100"]
    intra = replace(cluster.intra, bytes_per_s=cluster.intra.bytes_per_s * faster)
    inter = replace(cluster.inter, bytes_per_s=cluster.inter.bytes_per_s * faster)
    for part in volume(step(SPARSE, **fields)):
        before, after = part.tiers_s(cluster), part.tiers_s(replace(cluster, intra=intra, inter=inter))
        assert after[0] <= before[0]
        assert after[1] <= before[1]


def test_a_program_that_does_not_fit_the_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'coordinated' .*needs etp=tp=8.*nearest legal: 'flat'"):
        volume(step(SPARSE, tp=8, dp=8, ep=8, alltoall="coordinated"))
    with pytest.raises(ConfigError, match=r"unknown all-to-all program 'hierarchic'.*did you mean 'hierarchical'"):
        volume(step(SPARSE, dp=8, ep=8, alltoall="hierarchic"))
    with pytest.raises(ConfigError, match="num_experts=8 must be at least the 16 expert ranks"):
        volume(step(SPARSE, dp=16, ep=16))


def test_a_hundred_thousand_devices_are_no_slower_than_eight() -> None:
    strategy = Strategy(tp=8, pp=10, ep=64, etp=8, zero=1).check(102_400, num_experts=64)
    asked = Step(
        shape=replace(SPARSE, num_experts=64), strategy=strategy, devices_per_node=8, tokens=1e6, micro_batches=64
    )
    started = time.process_time()
    assert volume(asked)
    assert time.process_time() - started < 0.1


def test_one_matrix_for_tokens_in_and_out_is_reduced_once_where_both_are() -> None:
    tied = replace(SHAPES["llama3-8b"], tied_embeddings=True)
    (whole,) = stages(tied, 1)
    table = tied.vocab_size * tied.dim
    assert dense_stage_params(tied, whole) == dense_stage_params(SHAPES["llama3-8b"], whole) - table
    for end in stages(tied, 2):
        assert dense_stage_params(tied, end) > table
