"""Inference: laws of bandwidth, batch and memory hold; experts are counted as simulated; published figures are met."""

import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.clusters import CLUSTERS
from turnout.errors import ConfigError
from turnout.plan.inference import Inference, infer
from turnout.plan.inference_cases import answers, deepspeed_moe
from turnout.plan.inference_experts import Offload, touched, touched_at_busiest
from turnout.plan.inference_load import cache_bytes_per_token, decode_load, prefill_load
from turnout.plan.inference_memory import sequence_cache_bytes
from turnout.plan.inference_pass import ForwardPass, forward
from turnout.plan.inference_search import exchanges, layouts, search_inference
from turnout.plan.layout import layout_of
from turnout.plan.serving import Serving
from turnout.plan.shapes import SHAPES
from turnout.topology import Cluster

# of mixtral-8x7b on 16 devices of two nodes
LAYOUTS = (
    "ep=8", "ep=8,overlap=2", "ep=8,alltoall=hierarchical", "ep=8,alltoall=node_dedup", "tp=2,ep=4", "tp=8",
    "tp=2,ep=8,shard_tokens=true", "tp=2,ep=4,etp=2,alltoall=coordinated", "tp=4,ep=2,etp=4",
    "tp=4,ep=8,folded=true,shard_tokens=true", "tp=8,ep=8,etp=2,folded=true,shard_tokens=true", "tp=4,ep=8,folded=true",
    "tp=2,ep=4,precision=fp8,dispatch_precision=fp8", "etp=2,ep=8,folded=true,shard_tokens=true",
)  # fmt: skip
TIERS = ("memory", "intra", "inter", "host", "flops")


def serving(layout: str = "ep=8", *, model: str = "mixtral-8x7b", devices: int = 16, **fields: object) -> Serving:
    asked = {"cluster": "dgx-h100", "batch": 64, "context": 1024, "new_tokens": 64} | fields
    return Serving(model=model, devices=devices, strategy=layout_of(layout), **asked)


def faster(cluster: Cluster, tier: str, times: float) -> Cluster:
    if tier in ("intra", "inter"):
        link = getattr(cluster, tier)
        return replace(cluster, **{tier: replace(link, bytes_per_s=link.bytes_per_s * times)})
    device = cluster.device
    if tier == "memory":
        return replace(cluster, device=replace(device, memory_bytes_per_s=device.memory_bytes_per_s * times))
    peaks = replace(device.peak_flops_per_s, **{k: v * times for k, v in vars(device.peak_flops_per_s).items()})
    return replace(cluster, device=replace(device, peak_flops_per_s=peaks))


# --- experts ---


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 1), (8, 2, 3), (64, 6, 10), (128, 1, 200)])
def test_distinct_experts_are_as_many_as_simulated(experts: int, top_k: int, tokens: int) -> None:
    drawn = [draw(experts, top_k, tokens, seed) for seed in range(1000)]
    mean = sum(map(len, drawn)) / len(drawn)
    assert touched(experts, top_k, tokens) == pytest.approx(mean, rel=0.015)


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "ranks"),
    [(128, 1, 1, 128), (128, 1, 40, 16), (64, 6, 1, 8), (64, 6, 5, 8), (256, 8, 16, 64), (8, 2, 4, 2), (8, 2, 4, 1)],
)
def test_the_busiest_rank_reads_as_many_as_simulated(experts: int, top_k: int, tokens: int, ranks: int) -> None:
    size, total, times = experts // ranks, 0, 1000
    for seed in range(times):
        chosen = draw(experts, top_k, tokens, seed)
        total += max(sum(expert // size == rank for expert in chosen) for rank in range(ranks))
    assert touched_at_busiest(experts, top_k, tokens, ranks) == pytest.approx(total / times, rel=0.06)


def draw(experts: int, top_k: int, tokens: int, seed: int) -> set[int]:
    """Experts that tokens choose, each any `top_k` of them."""
    choose = random.Random(seed)
    return {expert for _ in range(tokens) for expert in choose.sample(range(experts), top_k)}


@given(
    experts=st.sampled_from([8, 64, 2048]), tokens=st.floats(1, 1e6), ranks=st.sampled_from([1, 2, 8]),
    top_k=st.integers(1, 8),
)  # fmt: skip
def test_no_rank_reads_more_than_it_has_nor_less_than_the_mean(
    experts: int, tokens: float, ranks: int, top_k: int
) -> None:
    most = touched_at_busiest(experts, top_k, tokens, ranks)
    assert touched(experts, top_k, tokens) / ranks * (1 - 1e-9) <= most <= experts / ranks


# --- laws ---


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS), tier=st.sampled_from(TIERS), times=st.floats(1, 16), batch=st.integers(1, 4096),
    cached=st.integers(0, 2),
)  # fmt: skip
def test_more_bandwidth_is_never_slower(layout: str, tier: str, times: float, batch: int, cached: int) -> None:
    base, cluster = 32e9, CLUSTERS["dgx-h100"]
    before = serving(layout, batch=batch, offload=Offload(cached=cached, host_bytes_per_s=base))
    if tier == "host":
        after = replace(before, offload=Offload(cached=cached, host_bytes_per_s=base * times))
    else:
        after = replace(before, cluster=faster(cluster, tier, times))
    was, is_now = infer(before), infer(after)
    assert is_now.tpot_s <= was.tpot_s * (1 + 1e-9)
    assert is_now.ttft_s <= was.ttft_s * (1 + 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_throughput_grows_with_the_batch_until_products_bind(layout: str) -> None:
    rates = [infer(serving(layout, batch=2**i)).decode_tokens_per_s for i in range(18)]
    assert all(after >= before * (1 - 1e-9) for before, after in pairwise(rates))
    # where everything is proportional to the tokens there is nothing more to gain
    assert rates[5] > 8 * rates[0]
    assert rates[-1] < 1.1 * rates[-2]


@pytest.mark.parametrize("model", ["mixtral-8x7b", "llama3-8b", "olmoe-1b-7b"])
def test_a_lone_token_takes_at_least_the_time_to_read_what_it_meets(model: str) -> None:
    shape = SHAPES[model]
    found = infer(serving("tp=1", model=model, devices=1, batch=1))
    read = 2 * (shape.active_params - shape.embedding_params)
    assert found.tpot_s >= read / CLUSTERS["dgx-h100"].device.memory_bytes_per_s
    # nothing but norms is left out
    assert found.decode.weight_bytes == pytest.approx(read, rel=1e-3)
    assert found.limit_s <= found.tpot_s


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lone_token_reads_no_less_over_ranks_than_it_meets(layout: str) -> None:
    shape, asked = SHAPES["mixtral-8x7b"], serving(layout, batch=1)
    strategy = asked.layout
    element = 1 if strategy.precision == "fp8" else 2
    dense = shape.dense_params - shape.embedding_params - shape.head_params
    expert = len(shape.sparse_layers) * shape.expert_params / strategy.etp
    assert infer(asked).decode.weight_bytes >= element * (dense / strategy.tp + expert) * 0.999


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_all_ranks_are_the_assignments_of_the_batch(layout: str) -> None:
    asked = serving(layout, batch=4096)
    one = ForwardPass(serving=asked, load=decode_load(asked))
    rows = one.routed()[0] * one.chunks * asked.world
    strategy = asked.layout
    # each slice of an expert has all of its rows; tokens that tensor ranks do not share arrive from each of them
    copies = strategy.etp if strategy.tokens_sharded else strategy.tp
    assert rows == pytest.approx(4096 * 2 * copies)


@given(batch=st.integers(1, 512), context=st.integers(1, 8192), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=40, deadline=None)
def test_parts_sum_and_memory_grows_with_batch_and_context(batch: int, context: int, layout: str) -> None:
    asked = serving(layout, batch=batch, context=context)
    found = infer(asked)
    parts = {name: value for name, value in vars(found.decode).items() if name.endswith("_s")}
    assert sum(parts.values()) == pytest.approx(found.tpot_s)
    assert min(parts.values()) >= 0
    for more in (replace(asked, batch=batch + 16), replace(asked, context=context + 64)):
        assert infer(more).memory.total_bytes >= found.memory.total_bytes
        assert infer(more).tpot_s >= found.tpot_s * (1 - 1e-9)


@given(length=st.integers(64, 4096))
@settings(max_examples=20, deadline=None)
def test_a_longer_prompt_takes_longer(length: int) -> None:
    short, longer = (serving(context=tokens) for tokens in (length, 2 * length))
    assert forward(longer, prefill_load(longer)).total_s > forward(short, prefill_load(short)).total_s


# --- cache, offload ---


@pytest.mark.parametrize(
    ("model", "layout", "per_token"),
    [
        # 61 layers of a latent vector of 512 + 64; 80 layers of 8 heads of 128, keys and values
        ("deepseek-v3", "ep=8", 61 * 576 * 2), ("deepseek-v3", "tp=8", 61 * 576 * 2),
        ("llama3-70b", "tp=1", 80 * 2 * 8 * 128 * 2), ("llama3-70b", "tp=8", 80 * 2 * 128 * 2),
        ("llama3-70b", "tp=16", 80 * 2 * 128 * 2),
    ],
)  # fmt: skip
def test_keys_and_values_are_what_the_attention_keeps(model: str, layout: str, per_token: int) -> None:
    asked = serving(layout, model=model, context=1000, new_tokens=24)
    assert cache_bytes_per_token(asked) * SHAPES[model].num_layers == per_token
    assert sequence_cache_bytes(asked) == per_token * 1024
    assert sequence_cache_bytes(replace(asked, kv_precision="fp8")) == per_token * 1024 / 2


def test_a_windowed_block_keeps_its_window() -> None:
    asked = serving("tp=1", model="gpt-oss-20b", context=8000, new_tokens=192)
    assert sequence_cache_bytes(asked) == 12 * (128 + 8192) * 2 * 8 * 64 * 2


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_experts_on_the_device_save_time_and_cost_memory(batch: int) -> None:
    found = [
        infer(serving("tp=1", devices=1, batch=batch, offload=Offload(cached=cached))) for cached in (1, 2, 4, 7, 8)
    ]
    times, sizes = [each.tpot_s for each in found], [each.memory.total_bytes for each in found]
    assert times == sorted(times, reverse=True)
    assert sizes == sorted(sizes)
    assert found[-1].decode.host_s == 0 == infer(serving("tp=1", devices=1, batch=batch)).decode.host_s
    # a miss is an expert over the link: PCIe 5 of the data sheet
    shape, missed = SHAPES["mixtral-8x7b"], touched(8, 2, batch) * (1 - 4 / 8)
    assert found[2].decode.host_s == pytest.approx(32 * missed * shape.expert_params * 2 / 64e9)


def test_a_hit_rate_is_taken_in_place_of_the_share_that_is_kept() -> None:
    never = infer(serving("tp=1", devices=1, batch=1, offload=Offload(cached=4)))
    often = infer(serving("tp=1", devices=1, batch=1, offload=Offload(cached=4, hit_rate=0.9)))
    assert often.decode.host_s == pytest.approx(never.decode.host_s * 0.1 / 0.5)


# --- exchange ---


def test_the_exchange_of_a_token_needs_fewer_messages_in_two_levels_or_shared_over_tensor_ranks() -> None:
    """DeepSpeed-MoE, section 5: hops O(p) become O(G + p/G), or O(p/L) beside an all-gather."""
    model = deepspeed_moe(layers=30, dim=8192, heads=64)

    def wire_s(layout: str) -> float:
        asked = Serving(model=model, cluster="dgx-a100", devices=128, batch=16, strategy=layout_of(layout))
        one = ForwardPass(serving=asked, load=decode_load(asked))
        return one.exchange_s(1)

    flat, levels = wire_s("tp=8,ep=128,folded=true,shard_tokens=true"), wire_s("tp=1,ep=128,alltoall=hierarchical")
    shared = wire_s("tp=8,ep=16,etp=8,alltoall=coordinated")
    assert levels < flat / 2
    assert shared < flat / 3


def test_sends_under_way_together_pay_one_latency() -> None:
    asked = serving("ep=256", model="deepseek-v3", devices=256, batch=8192)
    assert infer(replace(asked, one_sided=True)).tpot_s < infer(asked).tpot_s


# --- search ---


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_the_search_finds_what_trying_everything_finds(goal: str) -> None:
    asked = serving("tp=1", devices=8, batch=64)
    result = search_inference(asked, goal=goal, batches=(8, 64, 512), top=3)
    found = {(each.serving.strategy, each.serving.batch): each for each in result.best}
    everything = [
        infer(other)
        for strategy in layouts(asked, {})
        for batch in (8, 64, 512)
        for other in exchanges(replace(asked, strategy=strategy, batch=batch))
    ]
    fitting = [each for each in everything if each.fits]
    best, *others = (score_of(each, goal) for each in result.best)
    assert [best, *others] == sorted([best, *others])
    assert best == pytest.approx(min(score_of(each, goal) for each in fitting))
    assert len(found) == 3
    assert result.considered == 3 * len(list(layouts(asked, {})))


def score_of(found: Inference, goal: str) -> float:
    return found.tpot_s if goal == "latency" else -found.decode_tokens_per_s


def test_a_limit_is_kept_and_a_tighter_one_never_gives_more() -> None:
    asked = serving("tp=1", devices=8)
    batches = tuple(8 * 2**i for i in range(8))
    rates = []
    for limit_s in (0.03, 0.015, 0.008):
        best = search_inference(asked, goal="throughput", limit_s=limit_s, batches=batches, top=2).best
        assert all(each.tpot_s <= limit_s for each in best)
        rates.append(best[0].decode_tokens_per_s)
    assert rates == sorted(rates, reverse=True)
    assert search_inference(asked, goal="latency", limit_s=1e-5).best == ()


def test_what_is_decided_stays() -> None:
    best = search_inference(serving("tp=2,ep=2"), said={"tp": 2, "ep": 2}).best
    assert {(each.serving.layout.tp, each.serving.layout.ep) for each in best} == {(2, 2)}


# --- published figures, bad use ---


def test_published_figures_are_met() -> None:
    found = {answer.case.id: answer for answer in answers()}
    assert found["deepspeed-1t"].predicted < 25
    assert found["deepspeed-1t"].case.serving.shape.total_params == pytest.approx(1046.9e9, rel=0.005)
    assert all(answer.holds for answer in found.values() if answer.case.relation != "equal")
    equal = [answer for answer in found.values() if answer.case.relation == "equal"]
    errors = [abs(answer.error) for answer in equal if answer.case.measured]
    assert (len(errors), len(equal)) == (6, 7)
    assert sum(errors) / len(errors) < 0.15
    assert max(errors) < 0.25


BAD = {
    "pipeline": (lambda: serving("pp=2"), r"strategy\.pp=2 is not planned for inference; nearest legal: 1"),
    "batch": (lambda: serving(batch=0), r"serving\.batch=0 must be at least 1; nearest legal: 1"),
    "skew": (lambda: serving(skew=0.5), r"serving\.skew=0\.5 must be at least 1"),
    "experts": (lambda: serving("ep=16").layout, r"strategy\.ep=16 must divide num_experts=8; nearest legal: 8"),
    "encoder": (lambda: serving(model="gshard-600b").shape, r"encoder_layers=18 is not planned for inference"),
    "redundant": (
        lambda: serving(model="llama3-8b", redundant_experts=8).shape, r"redundant_experts=8 needs layers of equally"
    ),
    "kv": (lambda: serving(kv_precision="int8"), r"serving\.kv_precision='int8' must be one of"),
    "hit rate": (lambda: Offload(cached=1, hit_rate=1.5), r"offload\.hit_rate=1\.5 must be in 0\.\.1; nearest.* 1"),
    "cached": (lambda: Offload(cached=-1), r"offload\.cached=-1 must be at least 0"),
    "host": (
        lambda: infer(serving("tp=1", devices=4, cluster="tpu-v4", offload=Offload(cached=1))),
        r"host link of .* is not known",
    ),
    "goal": (lambda: search_inference(serving(), goal="speed"), r"goal='speed' must be one of: latency, throughput"),
    "limit": (lambda: search_inference(serving(), limit_s=-1), r"limit_s=-1 must be at least 0"),
    "decided": (lambda: search_inference(serving(), said={"tp": 3}), r"strategy\.tp=3 .* must divide world=16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_use_names_the_field(case: str) -> None:
    build, pattern = BAD[case]
    with pytest.raises(ConfigError, match=pattern):
        build()


def test_inference_reaches_neither_torch_nor_numpy() -> None:
    code = """
import sys
from turnout.plan.inference_cases import answers
answers()
assert not {"torch", "numpy"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
