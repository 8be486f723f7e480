"""Time: parts add up, laws of bandwidth and load hold, and schedules leave idle what their papers say."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.collectives import all_gather, all_reduce, collective, group
from turnout.plan.compute import block_time, layer_time
from turnout.plan.engine import Engine
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.job import Job
from turnout.plan.memory import memory
from turnout.plan.parameters import Parameters, fitted
from turnout.plan.shapes import SHAPES
from turnout.plan.step import step_of
from turnout.plan.time import StepTime, step_time
from turnout.plan.volume import volume
from turnout.plan.wire import node_limit, wire_of
from turnout.strategy import Strategy
from turnout.topology import Cluster

LAYOUTS = st.one_of(
    st.fixed_dictionaries(
        {
            "tp": st.sampled_from([1, 2, 8]), "pp": st.sampled_from([1, 4]), "dp": st.sampled_from([1, 4, 32]),
            "zero": st.sampled_from([0, 1, 3]), "cp": st.sampled_from([1, 2]),
            "recompute": st.sampled_from(["none", "selective", "full"]), "precision": st.sampled_from(["bf16", "fp8"]),
        }
    ),
    st.fixed_dictionaries(
        {
            "tp": st.sampled_from([1, 2]), "pp": st.sampled_from([1, 2]), "dp": st.sampled_from([8, 32]),
            "ep": st.sampled_from([1, 4, 8]), "folded": st.just(True), "overlap": st.sampled_from([1, 2]),
            "alltoall": st.sampled_from(["flat", "hierarchical", "node_dedup"]),
        }
    ),
)  # fmt: skip


def job(model: str = "llama3-8b", *, batch: int = 256, **layout: object) -> Job:
    return Job(shape=SHAPES[model], strategy=Strategy(**({"dp": 8} | layout)), seq_len=4096, global_batch=batch)


def laid_out(layout: dict[str, object]) -> Job:
    return job("mixtral-8x7b" if "ep" in layout else "llama3-8b", **layout)


def faster(cluster: Cluster, **times: float) -> Cluster:
    changed = {name: getattr(cluster, name) for name in times}
    links = {name: replace(link, bytes_per_s=link.bytes_per_s * times[name]) for name, link in changed.items()}
    return replace(cluster, **links)


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, times=st.floats(1.0, 8.0), tier=st.sampled_from(["intra", "inter"]))
def test_more_bandwidth_never_slows_a_plan(layout: dict[str, object], times: float, tier: str) -> None:
    cluster, asked = CLUSTERS["dgx-h100"], laid_out(layout)
    before = step_time(asked, cluster).step_s
    assert step_time(asked, faster(cluster, **{tier: times})).step_s <= before * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS)
def test_parts_are_not_negative_and_add_up(layout: dict[str, object]) -> None:
    step = step_time(laid_out(layout), CLUSTERS["dgx-h100"])
    parts = [getattr(step, field.name) for field in fields(StepTime) if field.name != "step_s"]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(step.step_s)


@settings(max_examples=30, deadline=None)
@given(layout=LAYOUTS, times=st.integers(2, 4))
def test_a_larger_batch_takes_longer_and_no_more_than_as_many_times(layout: dict[str, object], times: int) -> None:
    asked = laid_out(layout)
    once = step_time(asked, CLUSTERS["dgx-h100"]).step_s
    more = step_time(replace(asked, global_batch=times * asked.global_batch), CLUSTERS["dgx-h100"]).step_s
    assert once < more <= times * once * (1 + 1e-9)


def test_skewed_routing_never_helps() -> None:
    even = job("mixtral-8x7b", dp=32, ep=8, folded=True)
    seconds = [step_time(replace(even, skew=skew), CLUSTERS["dgx-h100"]).step_s for skew in (1.0, 1.2, 2.0)]
    assert seconds == sorted(seconds)
    assert seconds[2] > seconds[0]


def test_a_faster_machine_is_faster() -> None:
    asked = job("llama3-70b", dp=8, tp=8)
    seconds = [step_time(asked, CLUSTERS[name]).step_s for name in ("dgx-a100", "dgx-h100", "dgx-b200")]
    assert seconds == sorted(seconds, reverse=True)


def test_a_pipeline_idles_as_its_schedule_says() -> None:
    # 96 blocks over 8 stages: all stages alike but for the output matrix
    base = job("gpt3-175b", batch=64, dp=1, tp=8, pp=8)
    one = step_time(base, CLUSTERS["dgx-h100"])
    share = one.bubble_s / (one.step_s - one.bubble_s)
    assert share == pytest.approx(7 / 64, rel=0.2)
    strategy = replace(base.strategy, schedule="interleaved", virtual_stages=4)
    assert step_time(replace(base, strategy=strategy), CLUSTERS["dgx-h100"]).bubble_s == pytest.approx(
        one.bubble_s / 4, rel=0.2
    )


def test_full_recomputation_costs_about_a_forward_pass() -> None:
    base = job("llama3-70b", tp=8, dp=8)
    full = replace(base, strategy=replace(base.strategy, recompute="full"))
    times = [step_time(each, CLUSTERS["dgx-h100"]).compute_s for each in (base, full)]
    assert 1.2 < times[1] / times[0] < 1.45


def test_overlap_hides_part_of_the_exchange_and_taxes_computation() -> None:
    base = job("mixtral-8x7b", dp=32, ep=8, folded=True)
    lapped = replace(base, strategy=replace(base.strategy, overlap=2))
    plain, hidden = (step_time(each, CLUSTERS["dgx-h100"]) for each in (base, lapped))
    assert hidden.ep_s < plain.ep_s
    assert hidden.tax_s > plain.tax_s


def test_dedup_between_nodes_is_not_slower() -> None:
    flat = job("deepseek-v3", dp=64, ep=64, folded=True)
    dedup = replace(flat, strategy=replace(flat.strategy, alltoall="node_dedup"))
    times = [step_time(each, CLUSTERS["h800"]).ep_s for each in (flat, dedup)]
    assert times[1] < 0.6 * times[0]


def test_tensor_parallel_communication_in_chunks_hides_behind_products_but_for_one() -> None:
    times = [
        step_time(job("llama3-70b", tp=8, sequence_parallel=True, tp_overlap=chunks), CLUSTERS["dgx-h100"])
        for chunks in (1, 2, 64)
    ]
    whole, two, many = (each.tp_s for each in times)
    # each chunk has a launch and latencies of its own
    assert (1 - fitted().hidden_tp) * whole < two < whole
    assert many > two
    assert times[0].tax_s < times[1].tax_s
    assert times[1].step_s < times[0].step_s


V3 = replace(
    job("deepseek-v3", batch=15_360, dp=128, pp=16, ep=64, folded=True, schedule="dualpipe", precision="fp8", zero=1,
        dispatch_precision="fp8", alltoall="node_dedup", recompute="light", kept_precision="fp8"),
    shape=replace(SHAPES["deepseek-v3"], mtp_layers=1), framework=FRAMEWORKS["deepseek"],
)  # fmt: skip


def test_deepseek_v3_takes_its_published_step() -> None:
    # 14.8 T tokens in 2.664 M H800 hours: DeepSeek-AI 2024, arXiv:2412.19437, table 1: 19.9 s a step of 15,360 x 4,096;
    # of it 17.55 s (1.13 + 1.99 + 0.48 + 13.95) in passes and 0.29 s "opt" after them: arXiv:2505.09343, table 4
    assert V3.world == 2048
    step = step_time(V3, CLUSTERS["h800"])
    assert step.step_s == pytest.approx(19.93, rel=0.15)
    after = step.dp_s + step.optimizer_s
    assert step.step_s - step.bubble_s - after == pytest.approx(17.55, rel=0.15)
    assert after == pytest.approx(0.29, rel=0.15)
    # the exchange runs behind the other direction's chunks (arXiv:2412.19437, section 3.2.1), where there are any
    assert 0 < step.ep_s < 0.03 * step.step_s
    assert step.tax_s > 0


def test_deepseek_v3_fits_its_own_machine_and_not_without_its_savings() -> None:
    ours = memory(V3)
    assert ours.fits(CLUSTERS["h800"].device.memory_bytes)
    for without in ({"kept_precision": ""}, {"kept_precision": "", "recompute": "none"}):
        more = memory(replace(V3, strategy=replace(V3.strategy, **without)))
        assert not more.fits(CLUSTERS["h800"].device.memory_bytes)
    assert memory(replace(V3, framework=FRAMEWORKS["megatron-core"])).allocated_bytes > ours.allocated_bytes


@pytest.mark.parametrize(
    ("program", "limit", "gb"), [("node_dedup", 4, 271.1), ("node_dedup", 0, 358.8), ("flat", 0, 542.0)]
)
def test_deepseek_v3_keeps_its_card_busy_for_5_or_11_seconds(program: str, limit: int, gb: float) -> None:
    """At most 4 nodes a token (arXiv:2412.19437), 3.5 of them others: 5.4 s on a 50 GB/s card, not merged 10.8 s."""
    strategy = replace(V3.strategy, alltoall=program)
    asked = replace(V3, shape=SHAPES["deepseek-v3"], strategy=strategy)
    (part,) = [each for each in volume(step_of(asked, 8, node_limit=limit)) if each.axis == "ep"]
    assert part.inter_bytes == pytest.approx(gb * 1e9, rel=1e-3)
    if limit or program == "flat":
        assert part.inter_bytes / 50e9 == pytest.approx(5.4 if limit else 10.8, rel=0.01)
    assert node_limit(asked, CLUSTERS["h800"]) == 4


@pytest.mark.parametrize(("program", "slower"), [("flat", True), ("hierarchical", False), ("node_dedup", False)])
def test_rails_slow_what_goes_to_other_places_of_other_nodes(program: str, slower: bool) -> None:
    asked = job("deepseek-v3", dp=64, ep=64, folded=True, alltoall=program)
    spine = replace(CLUSTERS["h800"], oversubscription=4.0, nodes_per_leaf=32)
    rails, together = (step_time(asked, replace(spine, rails=each)).ep_s for each in (True, False))
    assert together == step_time(asked, CLUSTERS["h800"]).ep_s
    # 7 of 8 rows that leave a node, at a quarter of the bandwidth; the latency of messages is the same
    assert rails > 3 * together if slower else rails == together
    assert step_time(asked, replace(spine, oversubscription=8.0)).ep_s >= rails


def test_a_rank_fed_from_both_ends_does_the_mean_of_its_two_stages() -> None:
    one_way = replace(V3, strategy=replace(V3.strategy, schedule="1f1b"))
    both = step_time(V3, CLUSTERS["h800"])
    assert both.compute_s < step_time(one_way, CLUSTERS["h800"]).compute_s
    assert memory(V3).weights_bytes > memory(one_way).weights_bytes


def test_light_recomputation_costs_less_time_than_full_and_less_memory_than_none() -> None:
    base = job("deepseek-v3", dp=64, ep=64, folded=True)
    jobs = [replace(base, strategy=replace(base.strategy, recompute=kind)) for kind in ("none", "light", "full")]
    none, light, full = (step_time(each, CLUSTERS["h800"]).compute_s for each in jobs)
    assert none < light < none + 0.4 * (full - none)
    kept = [memory(each).activations_bytes + memory(each).moe_bytes for each in jobs]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_that_share_an_expert_share_its_arithmetic(shared: bool) -> None:
    engine = Engine(device=CLUSTERS["dgx-h100"].device, parameters=replace(fitted(), gemm_passes=0.0))
    seconds = []
    for tp in (1, 4):
        asked = job("mixtral-8x7b", dp=8, tp=tp, ep=8, etp=tp, shard_tokens=shared and tp > 1)
        router_s = engine.product_s(asked.routed_tokens, 8, asked.shape.dim, "bf16")
        seconds.append(tp * (block_time(asked, 0, engine).experts_s - router_s))
    assert seconds[1] == pytest.approx(seconds[0])


def test_products_of_experts_reach_their_share_of_the_rate_of_one() -> None:
    engine = Engine(device=CLUSTERS["dgx-h100"].device, parameters=replace(fitted(), gemm_passes=0.0))
    one, grouped = (engine.product_s(4096, 4096, 4096, "bf16", grouped=each) for each in (False, True))
    assert one == pytest.approx(fitted().grouped * grouped)


@pytest.mark.parametrize(("precision", "element"), [("bf16", 2), ("fp8", 1)])
def test_a_product_costs_its_operations_and_the_way_of_its_operands(precision: str, element: int) -> None:
    device, of = CLUSTERS["dgx-h100"].device, fitted()
    seconds = Engine(device=device, parameters=of).product_s(512, 1024, 256, precision)
    # operands in the precision of the product, the result in bf16
    moved = element * (512 * 256 + 256 * 1024) + 2 * 512 * 1024
    operations = 2 * 512 * 1024 * 256 / (of.gemm_hopper * device.flops_per_s(precision))
    assert seconds == pytest.approx(operations + of.gemm_passes * moved / (of.memory * device.memory_bytes_per_s))


@pytest.mark.parametrize("zero", [0, 1])
def test_an_update_reads_and_writes_moments_and_master_weights(zero: int) -> None:
    """Of 12 bytes each is read and written; the gradient is read, the weight written: 4 and 2."""
    machine, of = CLUSTERS["dgx-h100"], fitted()
    params = SHAPES["llama3-8b"].total_params / (8 if zero else 1)
    seconds = params * (2 * 12 + 4 + 2) / (of.memory * machine.device.memory_bytes_per_s)
    assert step_time(job(dp=8, zero=zero), machine).optimizer_s == pytest.approx(seconds, rel=1e-3)


def test_a_device_waits_for_a_host_that_launches_a_third_more_to_compute_blocks_again() -> None:
    slow = replace(fitted(), layer_call_s=10.0)
    alone, again = (
        step_time(job(dp=1, batch=4, recompute=recompute), CLUSTERS["dgx-h100"], slow) for recompute in ("none", "full")
    )
    launched = 4 * 32 * 10.0
    for step, calls in ((alone, launched), (again, 4 / 3 * launched)):
        assert step.launch_s > 0.9 * calls
        assert step.launch_s + step.compute_s == pytest.approx(calls)


def test_a_ring_of_keys_hides_behind_scores_of_all_passes_and_no_more() -> None:
    """3.5 times the forward pass's scores: once there, 2.5 times back; 4.5 where the forward pass is repeated."""
    machine = CLUSTERS["dgx-h100"]
    slow = replace(machine, intra=replace(machine.intra, bytes_per_s=1e8))
    one = job(dp=1, cp=8, batch=4, zero=0)
    share = 20 / machine.device.units
    # what is hidden taxes computation; gradients are sent in one piece at the end
    plain, again = (
        step_time(replace(one, framework=replace(one.framework, overlap_dp=False),
                          strategy=replace(one.strategy, recompute=recompute)), slow)
        for recompute in ("none", "full")
    )  # fmt: skip
    scores = 4 * 32 * block_time(one, 0, Engine(device=machine.device, parameters=fitted())).scores_s
    assert (plain.tax_s / share, again.tax_s / share) == (pytest.approx(3.5 * scores), pytest.approx(4.5 * scores))


def test_gradients_hidden_behind_a_pass_tax_it_and_none_are_lost() -> None:
    one = job(dp=8, batch=64)
    late = replace(one, framework=replace(one.framework, overlap_dp=False))
    hidden, exposed = (step_time(each, CLUSTERS["dgx-h100"]) for each in (one, late))
    share = 20 / CLUSTERS["dgx-h100"].device.units
    assert 0 < hidden.dp_s < exposed.dp_s
    assert hidden.dp_s + hidden.tax_s / share == pytest.approx(exposed.dp_s)
    assert exposed.tax_s == 0


def test_a_limit_to_groups_reaches_as_many_nodes_as_they_are_on() -> None:
    """Three of eight groups, two to a node: two nodes at most, not one and a half."""
    asked = job("deepseek-v2", dp=32, ep=32, folded=True)
    assert node_limit(asked, CLUSTERS["dgx-h100"]) == 2
    assert node_limit(replace(asked, strategy=replace(asked.strategy, ep=8)), CLUSTERS["dgx-h100"]) == 0


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_alone_takes_less_than_its_block_and_twice_as_long_backward(layer: int) -> None:
    engine = Engine(device=CLUSTERS["dgx-h100"].device, parameters=fitted())
    asked = job("deepseek-v3" if layer else "llama3-8b", dp=8, ep=8 if layer else 1)
    layer = 4 * layer  # the first blocks of the one are dense
    forward_s, backward_s = layer_time(asked, layer, engine)
    block = block_time(asked, layer, engine)
    assert block.experts_s < forward_s < block.forward_s
    assert 1.5 * forward_s < backward_s < 2 * forward_s < block.backward_s


# --- collectives over ranks that share parameters ---


def test_a_gather_is_a_ring_and_a_sum_may_be_a_tree() -> None:
    cluster, mesh = CLUSTERS["dgx-h100"], group(256, 1, 8)
    gathered = wire_of(collective("parameter all-gather", "dp", mesh, all_gather(mesh, 1e9)), cluster)
    summed = wire_of(collective("gradient all-reduce", "dp", mesh, all_reduce(mesh, 1e9)), cluster)
    # every step of the ring waits for a hop between nodes, a tree for one on each of its levels and the chains in nodes
    assert gathered.inter_latency_s == pytest.approx(255 * cluster.inter.latency_s)
    chained = 2 * 7 * cluster.intra.latency_s
    assert summed.inter_latency_s == pytest.approx(2 * 5 * cluster.inter.latency_s + chained)


def test_units_of_fsdp_go_round_the_ring_one_by_one() -> None:
    asked = replace(job("llama3-8b", dp=256, zero=3, batch=256), framework=FRAMEWORKS["torchtitan"])
    cluster = CLUSTERS["dgx-h100"]
    far = replace(cluster, intra=replace(cluster.intra, latency_s=1e-3))
    # 32 blocks, gathered twice and scattered, over the 255 hops of which 7 in 8 stay in a node
    hops = 3 * 32 * 255 * 7 / 8
    assert step_time(asked, far).dp_s - step_time(asked, cluster).dp_s > 0.9 * hops * 1e-3


def test_zero_sums_whole_gradients_after_the_last_backward_pass_where_a_framework_does() -> None:
    plain, sharded = (job("llama3-8b", dp=64, zero=zero, batch=64) for zero in (0, 1))
    ours, theirs = FRAMEWORKS["megatron-core"], FRAMEWORKS["nanotron"]
    names = {each.name for each in volume(step_of(replace(sharded, framework=theirs), 8))}
    assert names == {"dense gradient all-reduce", "dense parameter all-gather"}
    usual = volume(step_of(replace(sharded, framework=ours), 8))
    assert "dense gradient reduce-scatter" in {each.name for each in usual}
    cluster = CLUSTERS["dgx-h100"]
    exposed = {f.name: [step_time(replace(each, framework=f), cluster).dp_s for each in (plain, sharded)]
               for f in (ours, theirs)}  # fmt: skip
    # without ZeRO the sum runs behind the backward pass; with it neither sum nor gather does
    bytes_s = (2 * 4 + 2) * sharded.shape.total_params * 63 / 64 / 8 / cluster.inter.bytes_per_s
    assert exposed["nanotron"][1] > 0.95 * bytes_s > 3 * exposed["nanotron"][0]
    assert exposed["nanotron"][1] > 3 * exposed["megatron-core"][1]


def test_model_flops_count_what_the_flags_say() -> None:
    asked = job("llama3-70b", tp=8, dp=8)
    step = step_time(asked, CLUSTERS["dgx-h100"])
    all_pairs, causal = step.model_flops_per_s(asked), step.model_flops_per_s(asked, causal=True)
    assert causal < all_pairs < step.model_flops_per_s(asked, recompute=True)
    assert 0.2 < all_pairs / CLUSTERS["dgx-h100"].device.peak_flops_per_s.bf16 < 0.8


def test_there_are_at_most_twelve_parameters_and_they_are_shares_or_seconds() -> None:
    parameters = fitted()
    assert len(fields(Parameters)) <= 12
    for field in fields(Parameters):
        assert 0 < getattr(parameters, field.name) <= 4, field.name


def test_an_unknown_generation_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown device generation 'quantum'; known: ampere"):
        fitted().gemm("quantum")


def test_a_precision_the_device_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="precision='fp8' is not one"):
        step_time(job(precision="fp8"), CLUSTERS["dgx-a100"])


def test_a_hundred_thousand_devices_are_as_fast_as_eight_and_torch_is_never_imported() -> None:
    code = """
import sys, time
from turnout.clusters import CLUSTERS
from turnout.plan.job import Job
from turnout.plan.shapes import SHAPES
from turnout.plan.time import step_time
from turnout.strategy import Strategy
def once(dp):
    start = time.perf_counter()
    strategy = Strategy(dp=dp, tp=8, pp=4, ep=8, folded=True)
    job = Job(shape=SHAPES["mixtral-8x7b"], strategy=strategy, seq_len=4096, global_batch=4 * dp)
    step_time(job, CLUSTERS["dgx-h100"])
    return time.perf_counter() - start
once(1)
assert once(3125) < 20 * once(2) + 0.1
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
