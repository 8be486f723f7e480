"""Prediction of rows: each in its own quantity and unit, or refused with the reason, whatever the row holds."""

import re

import pytest

from turnout.clusters import CLUSTERS
from turnout.plan.data import nanotron_rows, published_cases, vtrain_one_node_rows
from turnout.plan.framework import FRAMEWORKS
from turnout.plan.predict import predict
from turnout.plan.row_machine import cluster_of
from turnout.plan.row_model import shape_of_record
from turnout.plan.rows import framework_of, job_of
from turnout.plan.shapes import SHAPES

ROW = {
    "id": "one", "suite": "mine", "model": "llama3-70b", "gpus": 64, "gpu": "H100-SXM80", "precision": "bf16",
    "layout": {"tp": 8, "pp": 1, "cp": 1}, "mbs": 1, "gbs": 128, "seq": 8192, "quantity": "step_time", "unit": "s",
    "source": "a test",
}  # fmt: skip


def only(row: dict[str, object]) -> float:
    (answer,) = predict([row])
    assert answer.predicted is not None, answer.refused
    return answer.predicted


def why(row: dict[str, object]) -> str:
    (answer,) = predict([row])
    assert answer.predicted is None
    return answer.refused


def test_quantities_agree_with_each_other() -> None:
    seconds, tokens = only(ROW), 128 * 8192
    assert only(ROW | {"unit": "ms", "quantity": "step_time"}) == pytest.approx(1e3 * seconds)
    per_gpu = only(ROW | {"quantity": "tokens_per_s_per_gpu", "unit": "tok/s/GPU"})
    assert per_gpu == pytest.approx(tokens / seconds / 64)
    assert only(ROW | {"quantity": "tokens_per_s", "unit": "tok/s"}) == pytest.approx(64 * per_gpu)
    tflops = only(ROW | {"quantity": "model_tflops_per_gpu", "unit": "TFLOP/s"})
    assert only(ROW | {"quantity": "mfu", "unit": "%"}) == pytest.approx(100 * tflops / 989.5)
    assert only(ROW | {"quantity": "mfu", "unit": "% of 1000"}) == pytest.approx(100 * tflops / 1000)
    assert only(ROW | {"quantity": "mfu", "unit": ""}) == pytest.approx(tflops / 989.5)


@pytest.mark.parametrize(
    ("quantity", "unit", "times"),
    [
        ("step_time", "us", 1e6), ("step_time", "min", 1 / 60), ("step_time", "seconds", 1.0),
        ("step_time_ms", None, 1e3),
        ("tokens_per_s_per_gpu", "ktok/s/GPU", 1e-3), ("tokens_per_s_per_gpu", "tokens/sec/device", 1.0),
        ("tokens_per_s", "tokens/s/chip", 1.0), ("tokens_per_s", "tokens per second", 64.0),
        ("samples_per_s", "samples/s", 64 / 8192), ("model_tflops_per_gpu", "PFLOP/s", 1e-3),
        ("model_tflops_per_gpu", "TFLOPS/GPU", 1.0), ("tflops", None, 1.0), ("mfu", "fraction", 0.01),
    ],
)  # fmt: skip
def test_a_unit_is_read_however_it_is_spelled(quantity: str, unit: str | None, times: float) -> None:
    plain = {
        "step": ("step_time", "s"), "mfu": ("mfu", "%"), "tokens": ("tokens_per_s_per_gpu", "tok/s/GPU"),
        "samples": ("tokens_per_s_per_gpu", "tok/s/GPU"),
    }.get(quantity.split("_")[0], ("model_tflops_per_gpu", "TFLOP/s"))  # fmt: skip
    base = only(ROW | dict(zip(("quantity", "unit"), plain, strict=True)))
    assert only(ROW | {"quantity": quantity, "unit": unit}) == pytest.approx(times * base)


@pytest.mark.parametrize(
    ("quantity", "unit"),
    [
        ("step_time", "fortnights"), ("step_time", "tok/s"), ("tokens_per_s", "s"), ("mfu", "TFLOP/s"), ("tflops", "%"),
        ("memory_peak", "Gb"), ("dispatch_fp8_logical_bw", "s"), ("a2a_8MiB_time", "GB/s"), ("a2a_8MiB_busbw", "us"),
    ],
)  # fmt: skip
def test_a_unit_of_another_kind_is_refused(quantity: str, unit: str) -> None:
    assert re.search(rf"unit '{unit}' is (none of|no share)", why(ROW | {"quantity": quantity, "unit": unit}))


def test_a_bandwidth_is_of_bytes_or_of_bits_as_its_unit_says() -> None:
    row = ROW | {"quantity": "a2a_500MB_busbw", "unit": "GB/s"}
    assert only(row | {"unit": "Gb/s"}) == pytest.approx(8 * only(row))
    assert only(row | {"unit": "MB/s"}) == pytest.approx(1e3 * only(row))
    assert only(row | {"unit": "GiB/s"}) == pytest.approx(1e9 / 2**30 * only(row))


def test_an_exchange_is_of_the_size_its_row_says_and_in_its_unit() -> None:
    row = ROW | {"quantity": "a2a_8MiB_time", "unit": "us"}
    assert only(row | {"unit": "ms"}) == pytest.approx(only(row) / 1e3)
    assert only(row) < only(row | {"quantity": "a2a_16MiB_time"}) < 2 * only(row)
    assert "does not say of how many bytes" in why(row | {"quantity": "a2a_time"})


def test_a_peak_is_of_what_is_held_or_of_what_is_allocated_as_its_name_says() -> None:
    row = ROW | {"unit": "GiB"}
    allocated = only(row | {"quantity": "peak_alloc_gib"})
    assert only(row | {"quantity": "max_allocated_bytes", "unit": None}) == pytest.approx(allocated * 2**30)
    assert only(row | {"quantity": "peak_mem_gib"}) == only(row | {"quantity": "peak_reserved"}) > allocated


def test_memory_is_answered_in_the_rows_own_unit() -> None:
    row = ROW | {"quantity": "memory_peak", "unit": "GiB"}
    assert only(row | {"unit": "GB"}) == pytest.approx(only(row) * 2**30 / 1e9)
    assert only(row | {"unit": None}) == pytest.approx(only(row))
    assert "unit 'pages' is none of 'memory_peak'; known: GiB, GB" in why(row | {"unit": "pages"})


def test_a_share_of_the_peak_is_of_fp16_where_there_is_no_other() -> None:
    row = ROW | {"gpu": "V100", "precision": "fp16", "quantity": "mfu", "unit": "%", "model": "gpt3-5b"}
    assert 5 < only(row | {"layout": {"tp": 8, "pp": 4}}) < 100


def test_flop_definitions_are_the_rows_own() -> None:
    plain = ROW | {"quantity": "model_tflops_per_gpu", "unit": "TFLOP/s"}
    causal = only(plain | {"notes": "causal attention"})
    again = only(plain | {"quantity": "achieved_tflops_per_gpu_with_recompute"})
    assert causal < only(plain) < again
    # the blocks' forward pass is counted twice, the output matrix's is not
    shape = SHAPES["llama3-70b"]
    forward = shape.forward_flops_per_token(8192, causal=False)
    assert again / only(plain) == pytest.approx(
        (4 * forward - 2 * shape.vocab_size * shape.dim) / (3 * forward), rel=1e-9
    )
    assert only(plain | {"quantity": "hfu", "unit": "%"}) == pytest.approx(100 * again / 989.5)


def test_dimensions_in_the_row_stand_for_a_named_model() -> None:
    dims = {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8, "vocab": 128256, "gated": True}
    assert only(ROW | {"model": "mine", "dims": dims}) == pytest.approx(only(ROW))


def test_records_of_the_file_stand_for_unknown_names() -> None:
    record = {"layers": 4, "hidden": 512, "heads": 8, "vocab": 1000, "gated_mlp": True, "kv_heads": 4,
              "moe": {"experts": 8, "top_k": 2, "expert_ffn": 256}}  # fmt: skip
    row = ROW | {"model": "small", "gpus": 8, "layout": {"tp": 1, "ep": 8}}
    (answer,) = predict([row], {"small": record})
    assert answer.predicted
    assert "no dimensions" in why(row)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantity": "moe_layer_speedup", "unit": "x"}, "quantity 'moe_layer_speedup' is not modelled"),
        ({"gpu": "Cerebras"}, "gpu='Cerebras' has no cluster description; known:.*dgx-h100"),
        ({"model": "unheard-of"}, "model='unheard-of' has no dimensions"),
        ({"gbs": None}, "does not say gbs"),
        ({"gpus": "many"}, "gpus='many' is not a positive whole number"),
        ({"seq": float("inf")}, "seq=inf is not a positive whole number"),
        ({"gbs": float("nan")}, "gbs=nan is not a positive whole number"),
        ({"seq": -1}, "seq=-1 is not a positive whole number"),
        ({"layout": {}}, "tp is not given"),
        ({"layout": None}, "tp is not given"),
        ({"layout": {"tp": 7}}, r"tp=7 .* must divide world=64; nearest legal"),
        ({"layout": {"tp": 8, "dp": 4}}, r"layout\.dp=4 times tp=8 \* cp=1 \* pp=1 is not gpus=64; .* dp=8"),
        ({"gpus": 128, "layout": {"tp": 1, "pp": 128}}, "must not exceed num_layers=80"),
        ({"model": "mixtral-8x22b"}, "ep is not given for a model with experts"),
        ({"dims": [1]}, "is not an object"),
        ({"precision": "fp8", "gpu": "A100-SXM80"}, "precision='fp8' is not one"),
        ({"skew": float("nan")}, "skew=nan is not a number"),
        ({"precision": "int8"}, "precision='int8' is not known; known: fp4, fp8, bf16"),
        ({"schedule": "chimera"}, "schedule='chimera' is not known; known: .*1f1b"),
        ({"recompute": True}, "recompute=True is not known; known: full, selective, light, none"),
        (
            {"model": "mixtral-8x7b", "layout": {"tp": 1, "ep": 8}, "dispatcher": "allgather"},
            "dispatcher='allgather' is",
        ),
        ({"layout": {"tp": 8, "hsdp": 2}}, "layout.hsdp=2 is not known; known: tp, pp"),
        ({"gpu": "GH200"}, "gpu='GH200' has no cluster description"),
        ({"gpu": "H100 PCIe"}, "gpu='H100 PCIe' has no cluster description"),
        ({"gpu": "V100 16GB"}, "gpu='V100 16GB' has no cluster description"),
    ],
)
def test_a_row_that_cannot_be_answered_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    assert re.search(reason, why(ROW | change))


@pytest.mark.parametrize("row", [{}, {"id": 1}, {"quantity": None}, {"gpu": 3, "quantity": "step_time"}])
def test_an_empty_row_is_refused_not_fatal(row: dict[str, object]) -> None:
    assert why(row)


def test_every_row_of_the_published_cases_is_answered_or_refused_in_order() -> None:
    document = published_cases()
    answers = predict(document["rows"], document["models"])
    assert [answer.id for answer in answers] == [row["id"] for row in document["rows"]]
    assert all((answer.predicted is None) == bool(answer.refused) for answer in answers)
    assert sum(answer.predicted is None for answer in answers) <= 40
    assert all(answer.predicted > 0 for answer in answers if answer.predicted is not None)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-30b-a3b"])
def test_a_record_alone_gives_the_size_of_the_named_shape(name: str) -> None:
    record = published_cases()["models"][name]
    assert shape_of_record(record, name).total_params == pytest.approx(SHAPES[name].total_params, rel=1e-3)


def test_the_code_a_row_ran_under_is_read_from_its_words() -> None:
    named = {row["suite"]: FRAMEWORKS.name_of(framework_of(row)) for row in published_cases()["rows"]}
    assert named["torchtitan"] == "torchtitan"
    dated = ROW | {"suite": "torchtitan", "source": "pytorch/torchtitan:benchmarks/llama3_h100_202412_torchtitan.md"}
    assert framework_of(dated).name == "torchtitan-2024"
    later = dated | {"source": "pytorch/torchtitan:benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"}
    assert framework_of(later).name == "torchtitan"
    assert framework_of(later | {"precision": "bf16 eager"}).name == "torchtitan-2024"
    assert job_of(later | {"async_tp": True}, {}).framework.overlap_tp
    assert only(later | {"async_tp": True}) < only(later)
    assert named["nemo_24.07"] == named["megatron_bridge"] == "nemo"
    assert named["vtrain_multi"] == named["korthikanti_table5"] == "megatron-2021"
    assert named["simumax_b200"] == named["moe_folding"] == "megatron-core"
    assert FRAMEWORKS.name_of(framework_of(nanotron_rows(nodes=1)[0])) == "nanotron"


def test_a_measured_fabric_replaces_the_data_sheet_and_never_beats_it() -> None:
    slow = cluster_of(ROW | {"all_reduce_gb_per_s": 16.0})
    assert slow.inter.bytes_per_s == pytest.approx(2e9)
    assert cluster_of(ROW | {"all_reduce_gb_per_s": 1e6}).inter == CLUSTERS["dgx-h100"].inter
    # of 1 GiB a rank has 16 MiB; what they take longer than at the data sheet's bandwidth is a step of the ring
    far = cluster_of(ROW | {"all_reduce_gb_per_s": 200.0, "all_gather_gb_per_s": 50.0})
    step_s = 2**24 * (1 / 50e9 - 1 / (8 * 48.5e9))
    assert (far.inter.latency_s, far.intra.latency_s) == pytest.approx((step_s, step_s))
    assert cluster_of(ROW | {"all_reduce_gb_per_s": 200.0, "all_gather_gb_per_s": 390.0}).inter.latency_s == 3.7e-6


@pytest.mark.parametrize(
    ("gpu", "cluster"),
    [
        ("h100 sxm5 80GB", "dgx-h100"), ("A100-SXM4-40GB", "dgx-a100-40"), ("A100-SXM4-80GB", "dgx-a100"),
        ("NVIDIA GB200 NVL72", "gb200-nvl72"), ("B200 192GB", "dgx-b200"), ("H200-SXM141", "dgx-h200"),
    ],
)  # fmt: skip
def test_a_machine_is_known_by_any_of_its_names(gpu: str, cluster: str) -> None:
    assert cluster_of(ROW | {"gpu": gpu}) == CLUSTERS[cluster]


def test_schedules_and_sequence_parallelism_are_what_the_row_says() -> None:
    row = ROW | {"gbs": 256, "layout": {"tp": 4, "pp": 4}}
    said = {"zero_bubble": "Zero bubble", "dualpipe": "DualPipe", "interleaved": "Interleaved1F1B", "1f1b": "1F1B"}
    assert {job_of(row | {"schedule": words}, {}).strategy.schedule for words in said.values()} == set(said)
    assert job_of(row, {}).strategy.sequence_parallel
    assert not job_of(row | {"layout": {"tp": 4, "pp": 4, "sp": False}}, {}).strategy.sequence_parallel


def test_experts_under_fsdp_alone_are_on_every_rank() -> None:
    row = ROW | {"model": "mixtral-8x22b", "layout": {"tp": 8, "fsdp": 8}}
    strategy = job_of(row, {}).strategy
    assert (strategy.ep, strategy.etp, strategy.zero) == (1, 1, 3)


def test_recomputation_is_what_the_row_says() -> None:
    assert job_of(ROW | {"recompute": "moe_act layernorm"}, {}).strategy.recompute == "light"
    assert job_of(ROW | {"recompute": "none", "notes": "full causal attention"}, {}).strategy.recompute == "none"
    assert job_of(ROW | {"recompute": False}, {}).strategy.recompute == "none"
    assert job_of(ROW | {"recompute": "full"}, {}).strategy.recompute == "full"
    assert job_of(ROW | {"recompute": "selective+sequence parallel"}, {}).strategy.recompute == "selective"
    assert job_of(ROW | {"notes": "full recompute assumed"}, {}).strategy.recompute == "full"
    assert job_of(ROW, {}).strategy.recompute == "none"


def test_megatron_bridge_trains_deepseek_v3_with_a_further_token() -> None:
    row = {
        "suite": "megatron_bridge", "model": "deepseek-v3", "gpus": 1024, "gpu": "H100", "precision": "FP8-SC",
        "layout": {"tp": 2, "pp": 8, "vp": 4, "ep": 64}, "mbs": 1, "gbs": 8192, "seq": 4096, "mtp": None,
    }  # fmt: skip
    job = job_of(row, {})
    assert job.shape.mtp_layers == 1
    assert job.framework.name == "nemo"
    assert job_of(row | {"mtp": False}, {}).shape.mtp_layers == 0
    assert job_of(row | {"suite": "simumax_b200"}, {}).shape.mtp_layers == 0
    assert job_of(row | {"model": "qwen3-30b-a3b"}, {}).shape.mtp_layers == 0


def test_one_node_rows_of_vtrain_are_rows_too() -> None:
    rows = vtrain_one_node_rows()
    assert len(rows) == 1440
    assert all(answer.predicted for answer in predict(rows[:20]))
