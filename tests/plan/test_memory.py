"""Memory: the published analysis to its last digit, measured peaks, and laws that hold for every layout."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.plan.data import published_cases
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.job import Job
from turnout.plan.memory import GIB, Memory, beside_bytes, memory, memory_by_stage
from turnout.plan.pipeline import idle_passes, layers_in_flight, stages
from turnout.plan.predict import predict
from turnout.plan.shapes import SHAPES
from turnout.strategy import Strategy


def rows(suite: str) -> list[dict[str, object]]:
    return [row for row in published_cases()["rows"] if row["suite"] == suite]


def job(model: str = "llama3-8b", *, batch: int = 256, seq: int = 4096, **layout: object) -> Job:
    return Job(shape=SHAPES[model], strategy=Strategy(**({"dp": 8} | layout)), seq_len=seq, global_batch=batch)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_shards_the_optimizer_then_gradients_then_parameters(zero: int) -> None:
    """12 bytes of optimizer, 4 of gradient, 2 of weight a parameter: arXiv:1910.02054, figure 1, gradients in fp32."""
    rank = memory(job(tp=2, dp=8, zero=zero))
    params = SHAPES["llama3-8b"].total_params / 2
    assert rank.optimizer_bytes == pytest.approx(12 * params / (8 if zero >= 1 else 1), rel=1e-3)
    assert rank.gradients_bytes == pytest.approx(4 * params / (8 if zero >= 2 else 1), rel=1e-3)
    assert rank.weights_bytes == pytest.approx(2 * params / (8 if zero >= 3 else 1), rel=1e-3)


def test_zero_3_gathers_two_layers_and_the_gradients_of_one() -> None:
    shape = SHAPES["llama3-8b"]
    two, three = (memory(job(dp=8, zero=zero)) for zero in (2, 3))
    layer, table = shape.block_params(0), shape.vocab_size * shape.dim
    assert table > layer  # so that beside a layer lies the output matrix, and its gradients are the largest
    assert three.framework_bytes - two.framework_bytes == pytest.approx(2 * (layer + table + table))
    deep = replace(job(dp=8), shape=replace(shape, vocab_size=1024))
    two, three = (memory(replace(deep, strategy=replace(deep.strategy, zero=zero))) for zero in (2, 3))
    assert three.framework_bytes - two.framework_bytes == pytest.approx(2 * (2 * layer + layer))


def test_light_recomputation_keeps_what_it_starts_from() -> None:
    """Inputs of norms, of heads and of the gated activation, attention's output and its sums: nothing else."""
    shape = SHAPES["llama3-8b"]
    heads, width = shape.num_heads, shape.head_dim
    kept = 2 * 2 * shape.dim + 2 * (heads + 2 * shape.num_kv_heads) * width + 2 * heads * width + 4 * heads
    kept += 2 * 2 * shape.ffn_hidden
    assert memory(job(recompute="light")).activations_bytes == pytest.approx(32 * 4096 * kept)


def test_a_stage_on_two_ranks_of_a_pipeline_has_its_optimizer_on_both() -> None:
    """DualPipe: every rank holds two stages, and twice the ranks share the optimizer of each."""
    one = job("llama3-8b", pp=4, dp=8, zero=1)
    both = replace(one, strategy=replace(one.strategy, schedule="dualpipe"))
    plain, paired = memory_by_stage(one), memory_by_stage(both)
    for stage, mirror, rank in zip(plain, plain[::-1], paired, strict=True):
        assert rank.weights_bytes == stage.weights_bytes + mirror.weights_bytes
        assert rank.optimizer_bytes == pytest.approx((stage.optimizer_bytes + mirror.optimizer_bytes) / 2)


@pytest.mark.parametrize("recompute", ["none", "light", "full"])
def test_a_block_for_a_further_token_keeps_what_the_last_block_does_and_what_it_is_joined_from(recompute: str) -> None:
    one = job("deepseek-v3", ep=8, recompute=recompute)
    plain, further, longer = (
        memory(replace(one, shape=replace(one.shape, **change)))
        for change in ({}, {"mtp_layers": 1}, {"num_layers": one.shape.num_layers + 1})
    )
    joined = 4 * 4096 * 2 * 7168
    assert further.activations_bytes - joined == pytest.approx(longer.activations_bytes)
    assert further.moe_bytes == pytest.approx(longer.moe_bytes)
    assert further.moe_bytes > plain.moe_bytes or recompute == "full"


@pytest.mark.parametrize("row", [r for r in rows("korthikanti_fig1_memory") if "activations" in r["quantity"]],
                         ids=lambda row: row["id"])  # fmt: skip
def test_activations_are_those_of_korthikanti_figure_1(row: dict[str, object]) -> None:
    (answer,) = predict([row])
    assert answer.predicted == pytest.approx(row["value"], abs=0.01)


def test_measured_peaks_of_simumax_are_met() -> None:
    document = published_cases()
    errors = []
    for row in rows("simumax_b200"):
        (answer,) = predict([row | {"quantity": "peak_alloc", "unit": "GiB"}], document["models"])
        assert answer.predicted is not None
        errors.append(abs(answer.predicted / row["peak_alloc_gib"] - 1))
    assert sum(errors) / len(errors) < 0.015
    assert max(errors) < 0.04


LAYOUTS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4, 8]), "pp": st.sampled_from([1, 2, 4]), "dp": st.sampled_from([1, 2, 8]),
        "zero": st.sampled_from([0, 1, 2, 3]), "recompute": st.sampled_from(["none", "selective", "full"]),
        "micro_batch": st.sampled_from([1, 2, 4]),
    }
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    layout=LAYOUTS, framework=st.sampled_from(FRAMEWORKS.names()), model=st.sampled_from(["llama3-8b", "mixtral-8x7b"])
)
def test_memory_grows_with_the_micro_batch(layout: dict[str, object], framework: str, model: str) -> None:
    small = replace(job(model, **layout), framework=FRAMEWORKS[framework])
    large = replace(small, strategy=replace(small.strategy, micro_batch=2 * small.strategy.micro_batch))
    assert memory(large).activations_bytes >= memory(small).activations_bytes
    assert memory(replace(large, seq_len=8192)).allocated_bytes > memory(large).allocated_bytes


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, model=st.sampled_from(["llama3-8b", "mixtral-8x7b"]))
def test_more_devices_never_raise_memory_per_rank(layout: dict[str, object], model: str) -> None:
    few = job(model, **layout)
    for axis in ("dp", "tp"):
        many = replace(few, strategy=replace(few.strategy, **{axis: 2 * getattr(few.strategy, axis)}))
        assert memory(many).allocated_bytes <= memory(few).allocated_bytes * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(layout=LAYOUTS)
def test_recomputation_and_zero_only_save(layout: dict[str, object]) -> None:
    base = job(**(layout | {"recompute": "none", "zero": 0}))
    kept = [memory(replace(base, strategy=replace(base.strategy, recompute=r))) for r in ("none", "selective", "full")]
    assert kept[0].activations_bytes >= kept[1].activations_bytes >= kept[2].activations_bytes
    model = [memory(replace(base, strategy=replace(base.strategy, zero=z))).model_bytes for z in (0, 1, 2, 3)]
    assert model == sorted(model, reverse=True)


def test_expert_buffers_grow_with_skew_and_shrink_with_expert_tensor_ranks() -> None:
    even = job("mixtral-8x7b", dp=8, ep=8)
    assert memory(replace(even, skew=2.0)).moe_bytes > 1.9 * memory(even).moe_bytes
    # replicated tokens are on all ranks that share an expert: each keeps as many rows, and a part of what is inside
    whole, cut = (memory(job("mixtral-8x7b", dp=8, tp=4, ep=8, etp=etp)).moe_bytes for etp in (1, 4))
    inside = 4096 * 2 * 2 * 3 * SHAPES["mixtral-8x7b"].expert_hidden * 32
    assert whole - cut == pytest.approx(inside * 3 / 4)
    assert memory(job("llama3-8b")).moe_bytes == 0


def test_experts_are_spread_over_expert_ranks_and_their_optimizer_over_the_copies() -> None:
    one, eight = (memory(job("mixtral-8x7b", dp=8, ep=ep)).weights_bytes for ep in (1, 8))
    routed = 2 * SHAPES["mixtral-8x7b"].expert_total_params
    assert one - eight == pytest.approx(routed * 7 / 8)


def test_stages_hold_every_layer_once_and_only_the_ends_hold_tables() -> None:
    for pp, virtual in ((1, 1), (4, 1), (4, 3), (16, 1)):
        cut = stages(SHAPES["llama3.1-405b"], pp, virtual)
        assert sorted(layer for stage in cut for layer in stage.layers) == list(range(126))
        assert [stage.embedding for stage in cut].count(True) == [stage.head for stage in cut].count(True) == 1


def test_in_flight_layers_are_those_of_the_schedules() -> None:
    cut = stages(SHAPES["gpt3-175b"], 8, 1)
    one = Strategy(dp=1, pp=8)
    assert [layers_in_flight(stage, one, 64) for stage in cut] == [12 * (8 - i) for i in range(8)]
    assert layers_in_flight(cut[0], one, 2) == 24
    assert layers_in_flight(cut[0], replace(one, schedule="gpipe"), 64) == 12 * 64
    assert layers_in_flight(cut[0], replace(one, schedule="dualpipe"), 64) == 12 * 9
    # Korthikanti et al. 2022, section 4.2.3: L (1 + (p-1)/(p v)) layers on the first stage
    interleaved = replace(one, schedule="interleaved", virtual_stages=3)
    first = stages(SHAPES["gpt3-175b"], 8, 3)[0]
    assert layers_in_flight(first, interleaved, 64) == pytest.approx(96 * (1 + 7 / 24))


def test_idle_time_is_that_of_the_schedules() -> None:
    one = Strategy(dp=1, pp=8)
    assert idle_passes(one) == 7
    assert idle_passes(replace(one, schedule="interleaved", virtual_stages=4)) == 7 / 4
    assert idle_passes(replace(one, schedule="zero_bubble")) < idle_passes(one)


def test_parts_add_up_and_decide_whether_it_fits() -> None:
    parts = memory(job())
    assert isinstance(parts, Memory)
    summed = parts.model_bytes + parts.activations_bytes + parts.moe_bytes + parts.logits_bytes
    assert parts.allocated_bytes == pytest.approx(summed + parts.buffer_bytes + parts.framework_bytes)
    # what the allocator cannot use is 3 to 6 % of it, beside the context
    assert parts.fits(1.06 * parts.allocated_bytes + 2 * GIB)
    assert not parts.fits(1.03 * parts.allocated_bytes)
    assert parts.reserved_bytes < parts.allocated_bytes + beside_bytes(parts.allocated_bytes)


def test_every_stage_is_reported() -> None:
    assert [stage.stage for stage in memory_by_stage(job(pp=4))] == [0, 1, 2, 3]
